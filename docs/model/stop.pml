/* The stop protocol of Sluicegate, for the model checker Spin.
 *
 * One session: its database row, its Redis state, and everybody who races for it. What is claimed is
 * invariants 1 to 3 of the design: Seen = saved, Stop is a fence, One ending. README.md says how the
 * steps map to code; check.py runs the scenarios and takes out one guard after the other.
 *
 * Read it in this order: the claims, the guards, the row and its statements, the Redis state and its
 * verbs, then the processes. What is written in CAPITALS with parentheses is one step: one SQL
 * statement or one Lua script, and nothing else can happen inside it.
 *
 * Text is a row of numbered tokens. A token names the worker whose upstream produced it and its
 * place, so two texts are equal exactly when their tokens are.
 */

/* ---- Sizes: a scenario is a choice of these ------------------------------------------------ */

#ifndef TOKENS
#define TOKENS 3            /* what an upstream produces before it ends by itself */
#endif
#ifndef DELIVERIES
#define DELIVERIES 1        /* how often Celery delivers the session's message: 1 or 2 */
#endif
#ifndef TERMINATORS
#define TERMINATORS 2       /* 0 to 2 callers of terminate, with different reasons */
#endif
#ifndef UNANSWERED
#define UNANSWERED 1        /* how many Redis calls of workers go unanswered */
#endif
/* TAKEOVER       the reaper releases an owner once, and one more message is sent
 * CHECKPOINTS    workers write checkpoints
 * SILENCE        an upstream may fall silent for ever (only with a terminator, as a timeout is one)
 * WEB_IS_QUICK   the web process's OPEN comes before everything else
 * NO_READER      without the reader, who decides nothing; for the search for endless runs
 * VISIBLE_ONLY   see the claims
 * These are off unless defined. */

#define TEXT_MAX    (2 * TOKENS + 1)
#define TOKEN(who, place)   ((who) * 16 + (place) + 1)
/* Upstreams differ in length, because a second worker gets another answer from the model. */
#define LENGTH_OF(who)      (TOKENS + ((who) > 1))

typedef Text { byte token[TEXT_MAX] };

#define NOBODY 0
#define NO_REASON 0

mtype = { ACTIVE, ENDED };                              /* row_status */
mtype = { STOP, USER, ADMIN };                          /* reasons */
mtype = { OK, ABSENT, STALE, FENCED, BEHIND };          /* answers of the verbs */

/* ---- The claims ---------------------------------------------------------------------------- */

mtype = {
    /* What a user could notice. The number is that of the invariant in the design. */
    Seen_is_saved,          /* 1: a reader that came to done was sent exactly the row's text */
    Nothing_lost,           /* 1: a natural end leaves none of its worker's text out of the log */
    Same_outcome,           /* 3: every receipt, and every process, says what the row says */
    Stop_on_record,         /* 3: who is on record as having stopped it did stop it */
    Done_after_commit,      /* 1: done is seen only when the row has ended */
    One_done,               /* 3: and there is one */
    All_have_ended,         /* 3: nobody waits for ever, the session ends */
    All_is_said,            /* 1: at the end the row is ended and published, and the log is its text */
    /* How the protocol brings that about. */
    Stop_is_a_fence,        /* 2: nothing enters the log after the first fence */
    First_fence_decides,    /* 2, 3: the row has the first fence's reason and length */
    One_commit,             /* 3: the session leaves ACTIVE once */
    One_owner,              /* 3: it is claimed only while it is ACTIVE and nobody's */
    Log_has_its_writer      /* 1: its owner's own text is never shorter than the log */
};

/* An assertion with a name. A name is never 0: it only makes Spin's message readable. With
 * VISIBLE_ONLY the inner claims are not looked at, to see what the damage would be. */
#define MUST(claim, condition)  assert((condition) || claim == 0)
#ifdef VISIBLE_ONLY
#define KEEPS(claim, condition) skip
#else
#define KEEPS(claim, condition) MUST(claim, condition)
#endif

/* ---- The guards: each is taken out by a -D of its name ------------------------------------- */

#if defined(NO_CLAIM_OWNER) || defined(NO_CLAIM_GUARD)
#define claim_owner_ok          true
#define owner_read_is_another   false
#else
#define claim_owner_ok          (row_owner == NOBODY)
#define owner_read_is_another   (owner != NOBODY)
#endif
#if defined(NO_CLAIM_EPOCH) || defined(NO_CLAIM_GUARD)
#define claim_epoch_ok(e)       true
#else
#define claim_epoch_ok(e)       (row_epoch == e)
#endif
#if defined(NO_CLAIM_STATUS)
#define claim_status_ok         true
#else
#define claim_status_ok         (row_status == ACTIVE)
#endif

#ifdef NO_RECORD_FIRST_WINS
#define record_ok               (row_status == ACTIVE)
#else
#define record_ok               (row_status == ACTIVE && row_stop == NO_REASON)
#endif

#ifdef NO_COMMIT_GUARD
#define commit_status_ok        true
#else
#define commit_status_ok        (row_status == ACTIVE)
#endif
#ifdef NO_COMMIT_EPOCH
#define commit_epoch_ok(e)      true
#else
#define commit_epoch_ok(e)      (row_epoch == e)
#endif

#ifdef NO_OPEN_EPOCH
#define open_is_stale(e)        false
#else
#define open_is_stale(e)        (e < state_epoch)
#endif
#ifdef NO_OPEN_RAISE
#define open_epoch(e)           state_epoch
#else
#define open_epoch(e)           e
#endif
#ifdef NO_OPEN_ONLY_IF_ABSENT
#define open_creates            true
#else
#define open_creates            (!state_exists)
#endif

#ifdef NO_APPEND_EPOCH
#define append_is_stale(e)      false
#else
#define append_is_stale(e)      (state_epoch != e)
#endif
#ifdef NO_APPEND_FENCE
#define append_is_fenced        false
#else
#define append_is_fenced        (state_fence != NO_REASON)
#endif
#ifdef NO_APPEND_START
#define append_is_behind(start) false
#else
#define append_is_behind(start) (state_end != start)
#endif

#ifdef NO_FENCE_FIRST_WINS
#define fence_is_taken          false
#else
#define fence_is_taken          (state_fence != NO_REASON)
#endif
#ifdef NO_FENCE_EPOCH
#define fence_is_stale(e)       false
#else
#define fence_is_stale(e)       (state_epoch != e)
#endif
#ifdef NO_FENCE_EXPECTED_END
#define fence_is_behind(end)    false
#else
#define fence_is_behind(end)    (state_end != end)
#endif

#ifdef NO_FINISH_ONCE
#define finish_is_repeated      false
#else
#define finish_is_repeated      (state_dones > 0)
#endif

#ifdef CHECKPOINT_UNACKNOWLEDGED
#define checkpoint_upto         length
#else
#define checkpoint_upto         acked
#endif

/* ---- The database row ---------------------------------------------------------------------- */

mtype row_status = ACTIVE;
byte  row_epoch, row_owner;
mtype row_stop;                     /* the recorded stop request */
byte  row_checkpoint;
mtype row_reason;                   /* these three are set by COMMIT */
byte  row_length;
Text  row_text;
bool  row_published;

bool  revoked;                      /* Celery's revoke: messages not yet started never will be */

/* ---- The Redis state ----------------------------------------------------------------------- */

bool  state_exists;
byte  state_epoch;
byte  state_end;
mtype state_fence;
Text  state_text;
short state_cuts;                   /* bit e: a log entry ends at position e */
byte  state_dones, state_done_at;

/* ---- An append that its worker no longer waits for: it arrives later ------------------------ */

bool  late_append;
byte  late_epoch, late_start, late_upto;
Text  late_text;
byte  unanswered_left = UNANSWERED;

/* ---- Kept for the claims alone; no process decides by them ---------------------------------- */

mtype first_fence;
byte  first_fence_end;
byte  commits;
bool  session_is_free = true;       /* never claimed, or released */
mtype receipt_reason;               /* the first receipt */
byte  receipt_length;

local byte k, same;                 /* scratch inside one step, 0 outside */

inline COPY(target, source, from, upto) {
    k = from;
    do
    :: k < upto -> target.token[k] = source.token[k]; k++
    :: else -> k = 0; break
    od
}

inline COMPARE(one, other, upto) {  /* leaves its answer in `same` */
    same = true;
    k = 0;
    do
    :: k < upto -> same = same && one.token[k] == other.token[k]; k++
    :: else -> k = 0; break
    od
}

inline CLEAR(target) {              /* what is not needed any more would only multiply the states */
    k = 0;
    do
    :: k < TEXT_MAX -> target.token[k] = 0; k++
    :: else -> k = 0; break
    od
}

/* ---- Statements: one SQL statement each ----------------------------------------------------- */

/* SELECT. What it read stays in status, epoch, owner, stop, checkpoint; if the session has ended,
 * this is the outcome that the process reports. */
inline READ() {
    d_step {
        status = row_status; epoch = row_epoch; owner = row_owner;
        stop = row_stop; checkpoint = row_checkpoint;
        if
        :: status == ENDED -> SAY(row_reason, row_length)
        :: else
        fi
    }
}

/* UPDATE ... SET epoch = epoch + 1, owner = me WHERE status = ACTIVE AND epoch = ? AND owner IS NULL.
 * The winner takes its own epoch to be the one that it named, plus one. */
inline CLAIM() {
    d_step {
        if
        :: claim_status_ok && claim_epoch_ok(epoch) && claim_owner_ok ->
            KEEPS(One_owner, row_status == ACTIVE && session_is_free);
            session_is_free = false;
            row_epoch++; row_owner = me; epoch++; won = true
        :: else -> won = false
        fi;
        printf("%d CLAIM: won %d, epoch %d\n", me, won, epoch)
    }
}

/* UPDATE ... SET stop = ? WHERE status = ACTIVE AND stop IS NULL. */
inline RECORD(reason) {
    d_step {
        if
        :: record_ok -> row_stop = reason
        :: else
        fi;
        printf("%d RECORD %e: on record is %e\n", me, reason, row_stop)
    }
}

/* UPDATE ... SET checkpoint = ? WHERE status = ACTIVE AND epoch = mine. */
inline CHECKPOINT() {
    d_step {
        if
        :: row_status == ACTIVE && row_epoch == epoch -> row_checkpoint = checkpoint_upto; won = true
        :: else -> won = false
        fi;
        printf("%d CHECKPOINT %d: won %d\n", me, checkpoint_upto, won)
    }
}

/* UPDATE ... SET status, reason, length, text WHERE status = ACTIVE AND epoch = ?.
 * Reason and end are the fence's; of log and checkpoint the longer is the text. */
inline COMMIT() {
    d_step {
        if
        :: commit_status_ok && commit_epoch_ok(epoch) ->
            row_status = ENDED;
            row_reason = why;
            row_length = (checkpoint > at -> checkpoint : at);
            COPY(row_text, text, 0, row_length);
            commits++; won = true;
            KEEPS(One_commit, commits == 1);
            KEEPS(First_fence_decides, row_reason == first_fence && row_length == first_fence_end);
            MUST(Stop_on_record, row_reason == STOP || row_reason == row_stop)
        :: else -> won = false
        fi;
        printf("%d COMMIT epoch %d, %e, length %d: won %d\n", me, epoch, why, at, won);
        if
        :: won -> SAY(row_reason, row_length)
        :: else
        fi
    }
}

/* UPDATE ... SET published. */
inline MARK_PUBLISHED() { row_published = true }

/* ---- Verbs: one Lua script each. The answer is in `answer`, `at` (an end), `why` (a reason) --- */

inline OPEN() {
    d_step {
        at = 0; why = NO_REASON;
        if
        :: state_exists && open_is_stale(epoch) -> answer = STALE
        :: else ->
            if
            :: open_creates ->
                state_exists = true; state_end = 0; state_fence = NO_REASON; state_cuts = 0
            :: else
            fi;
            state_epoch = open_epoch(epoch);
            at = state_end; why = state_fence;
            answer = (state_fence == NO_REASON -> OK : FENCED)
        fi;
        printf("%d OPEN %d: %e, end %d\n", me, epoch, answer, at)
    }
}

/* The batch is what `source` has from `start` to `upto`. */
inline APPEND(e, start, upto, source) {
    d_step {
        at = 0; why = NO_REASON;
        if
        :: !state_exists -> answer = ABSENT
        :: else -> if
        :: append_is_stale(e) -> answer = STALE
        :: else -> if
        :: append_is_fenced -> answer = FENCED; at = state_end; why = state_fence
        :: else -> if
        :: append_is_behind(start) -> answer = BEHIND; at = state_end
        :: else ->
            KEEPS(Stop_is_a_fence, first_fence == NO_REASON);
            k = start;
            do
            :: k < upto -> state_text.token[state_end] = source.token[k]; state_end++; k++
            :: else -> k = 0; break
            od;
            state_cuts = state_cuts | (1 << state_end);
            answer = OK; at = state_end
        fi fi fi fi;
        printf("%d APPEND epoch %d, from %d to %d: %e, end %d\n", me, e, start, upto, answer, at)
    }
}

/* A terminator's FENCE names neither epoch nor end. */
inline FENCE(reason) {
    d_step {
        at = 0; why = NO_REASON;
        if
        :: !state_exists -> answer = ABSENT
        :: else -> if
        :: fence_is_taken -> answer_fence()
        :: else -> take_fence(reason)
        fi fi;
        printf("%d FENCE %e: %e %e, end %d\n", me, reason, answer, why, at)
    }
}

/* A worker's FENCE, when its upstream has ended, names its epoch and the end that it expects. */
inline FENCE_COMPLETE(e, end, source) {
    d_step {
        at = 0; why = NO_REASON;
        if
        :: !state_exists -> answer = ABSENT
        :: else -> if
        :: fence_is_stale(e) -> answer = STALE
        :: else -> if
        :: fence_is_taken -> answer_fence()
        :: else -> if
        :: fence_is_behind(end) -> answer = BEHIND; at = state_end
        :: else ->
            take_fence(STOP);
            COMPARE(source, state_text, end);
            MUST(Nothing_lost, at == end && same);
            same = 0
        fi fi fi fi;
        printf("%d FENCE STOP epoch %d, expected end %d: %e %e, end %d\n", me, e, end, answer, why, at)
    }
}

inline take_fence(reason) {
    state_fence = reason;
    if
    :: first_fence == NO_REASON -> first_fence = reason; first_fence_end = state_end
    :: else
    fi;
    answer_fence()
}

inline answer_fence() { answer = FENCED; at = state_end; why = state_fence }

inline FINISH(length_) {
    d_step {
        if
        :: !state_exists || finish_is_repeated
        :: else -> state_dones++; state_done_at = length_
        fi;
        printf("%d FINISH %d\n", me, length_)
    }
}

/* XRANGE: the whole log, by a process that will go on from it or commit it. */
inline READ_LOG() {
    d_step { COPY(text, state_text, 0, state_end); length = state_end }
}

/* ---- What is made of steps ------------------------------------------------------------------ */

/* The outcome that a process reports is the row's, and everybody's. */
inline SAY(reason, length_) {
    printf("%d SAYS %e, length %d\n", me, reason, length_);
    MUST(Same_outcome, row_status == ENDED && reason == row_reason && length_ == row_length);
    MUST(Same_outcome, receipt_reason == NO_REASON || (reason == receipt_reason && length_ == receipt_length));
    receipt_reason = reason; receipt_length = length_
}

/* done into the log, then published_at. The answer to FINISH may be lost, and then it is sent again;
 * here it always is. */
inline PUBLISH(length_) {
    atomic { FINISH(length_); FINISH(length_) };
    MARK_PUBLISHED()
}

/* FENCE has answered `why` and `at`, `text` has that much, and `epoch` was read from the row. */
inline COMMIT_AND_PUBLISH(my_own) {
#ifdef COMMIT_OWN_REASON
    why = my_own;
#endif
#ifdef PUBLISH_BEFORE_COMMIT
    PUBLISH(at);
    COMMIT()
#else
    COMMIT();
    if
    :: won -> PUBLISH(row_length)
    :: else
    fi
#endif
}

/* ---- The processes --------------------------------------------------------------------------- */

/* The web process has just committed the row; its OPEN may be slow. */
proctype Web() {
    byte me = 10, epoch, at;
    mtype answer, why;

    OPEN();
    d_step { at = 0; answer = 0; why = 0 }
}

/* One delivery of the session's message. */
proctype Worker(byte me) {
    mtype status, stop, answer, why;
    byte epoch, owner, checkpoint, at;
    Text text;                          /* prefix found in the log, then what the upstream sent */
    byte length;                        /* of that text */
    byte acked;                         /* how much of it the log is known to have */
    bool won;

    if
    :: READ()
    :: revoked -> goto leave
    fi;
    if
    :: status == ENDED || owner_read_is_another -> goto leave
    :: else
    fi;
    CLAIM();
    if
    :: !won -> goto leave
    :: else
    fi;
#ifdef READ_LOG_BEFORE_OPEN
    READ_LOG();
    OPEN();
#else
    OPEN();
    READ_LOG();
#endif
    if
    :: answer == STALE -> goto leave
    :: answer == FENCED -> goto commit
    :: answer == OK -> acked = length
    fi;

    do
    :: length < LENGTH_OF(me) -> d_step { text.token[length] = TOKEN(me, length); length++ }
#ifdef SILENCE
    /* The upstream says nothing any more; only news from the lease, or a nudge, can help. */
    :: length < LENGTH_OF(me) -> goto silent
#endif

    :: length > acked ->
        APPEND(epoch, acked, length, text);
        if
        :: answer == OK -> acked = at
        :: answer == BEHIND ->
            KEEPS(Log_has_its_writer, at <= length);
            acked = at
        :: answer == FENCED -> goto cut
        :: answer == STALE -> goto leave
        fi

    /* No answer came in time. The script has run, or will run later; the worker will send again,
     * from the same start, with what has arrived in between. */
    :: d_step { length > acked && !late_append && unanswered_left > 0 ->
            unanswered_left--; late_append = true;
            late_epoch = epoch; late_start = acked; late_upto = length;
            COPY(late_text, text, acked, length);
            printf("%d APPEND epoch %d, from %d to %d: no answer\n", me, epoch, acked, length) }

#ifdef CHECKPOINTS
    :: row_checkpoint < checkpoint_upto ->
        CHECKPOINT();
        if
        :: won -> won = false
        :: else -> READ(); goto leave   /* ended, or another's by now */
        fi
#endif

#ifndef NO_LEASE_NEWS
    /* The lease renewal, or the nudge before it, brings the news: fenced, or another's by now. Here
     * it does not look at who asks, so a worker of an older epoch may take the fence for its own.
     * (renew.lua does look; COMMIT must not have to rely on it.) */
    :: d_step { state_fence != NO_REASON -> answer_fence() } -> goto cut
    :: state_epoch != epoch -> goto leave
#endif

    /* The upstream has ended. The rest and the fence go out in one pipeline, so the fence is sent
     * before the append's answer is known. Its own answer may be lost too; then all is tried again. */
    :: length >= LENGTH_OF(me) ->
        if
        :: length > acked -> APPEND(epoch, acked, length, text)
        :: else
        fi;
        FENCE_COMPLETE(epoch, length, text);
        if
        :: answer == FENCED -> goto cut
        :: answer == STALE -> goto leave
        :: answer == BEHIND ->
            KEEPS(Log_has_its_writer, at <= length);
            acked = at
        :: d_step { unanswered_left > 0 -> unanswered_left-- }
        fi
    od;

silent:
#ifndef NO_LEASE_NEWS
    if
    :: d_step { state_fence != NO_REASON -> answer_fence() }
    :: state_epoch != epoch -> goto leave
    fi;
#else
    false;
#endif
cut:
#ifdef COMMIT_UNCUT
    at = length;
#endif
commit:
    COMMIT_AND_PUBLISH(STOP);
    if
    :: won
    :: else -> READ()                   /* not ended? then another has claimed it, and sees the fence */
    fi;
leave: skip;
    d_step { status = 0; stop = 0; answer = 0; why = 0; epoch = 0; owner = 0; checkpoint = 0; at = 0;
        CLEAR(text); length = 0; acked = 0; won = 0 }
}

/* A caller of terminate: a user, an admin, a timeout. */
proctype Terminator(byte me; mtype my_reason) {
    mtype status, stop, answer, why;
    byte epoch, owner, checkpoint, at, length;
    Text text;
    bool won;

again:
    RECORD(my_reason);
    READ();                             /* whose request is on record, which epoch, who owns it */
    if
    :: status == ENDED -> goto leave
    :: else
    fi;
#ifdef COMMIT_WITHOUT_FENCE
    d_step { why = stop; at = state_end };
#else
    FENCE(stop);
    if
    :: answer == ABSENT -> OPEN(); FENCE(stop)
    :: else
    fi;
#endif
    revoked = true;                     /* REVOKE */
#ifdef RECEIPT_FROM_FENCE_NOT_ROW
    d_step { SAY(why, at) };
#endif
    if
    :: owner == NOBODY
    :: else ->
        /* NUDGE is speed only, and no step: the worker may learn of the fence from here on. Then
         * wait, until the row has ended or for long enough, and look. */
        READ();
        if
        :: status == ENDED -> goto leave
        :: else
        fi
    fi;
#ifdef TERMINATOR_ONLY_WAITS
    row_status == ENDED;
    READ();
#else
    READ_LOG();
    COMMIT_AND_PUBLISH(my_reason);
    if
    :: !won -> goto again               /* a claim, a release or another's commit came in between */
    :: else
    fi;
#endif
leave: skip;
    d_step { status = 0; stop = 0; answer = 0; why = 0; epoch = 0; owner = 0; checkpoint = 0; at = 0;
        CLEAR(text); length = 0; won = 0 }
}

/* The reaper takes an owner for lost, once, and wrongly: that worker is only slow. Or it does not. */
proctype Reaper() {
    if
    :: d_step { row_status == ACTIVE && row_owner != NOBODY ->
            row_owner = NOBODY; session_is_free = true; printf("RELEASE\n") };
        run Worker(DELIVERIES + 1)
    :: row_status == ENDED
    fi
}

/* What is late arrives, or does so when nobody cares any more. */
proctype Network() {
    byte me, at;
    mtype answer, why;

end:
    do
    :: late_append -> APPEND(late_epoch, late_start, late_upto, late_text);
        d_step { late_append = false; late_epoch = 0; late_start = 0; late_upto = 0; CLEAR(late_text);
            answer = 0; at = 0; why = 0 }
    od
}

#define entry_behind(position)  ((state_cuts >> (position + 1)) != 0)

/* What any reader must find when it comes to done. */
inline COME_TO_DONE() {
    printf("READER is done at %d\n", cursor);
    MUST(Done_after_commit, row_status == ENDED);
    COMPARE(seen, row_text, cursor);
    MUST(Seen_is_saved, cursor == row_length && same);
    same = 0
}

/* Follows the log from entry to entry, like XREAD behind its cursor, and stops at done; or, at any
 * time after the end, takes the rest from the row. Losing its connection and coming back with its
 * cursor, on any node, is no step of its own: the cursor is all that it has. */
proctype Reader() {
    byte cursor;
    Text seen;

    do
    :: d_step { entry_behind(cursor) ->
            k = cursor + 1;
            do
            :: !(state_cuts & (1 << k)) -> k++
            :: else -> break
            od;
            same = k;                   /* the end of the next entry; what lies behind the cursor is sent */
            COPY(seen, state_text, cursor, same);
            cursor = same; same = 0;
            printf("READER is at %d\n", cursor) }
    :: d_step { state_dones > 0 && !entry_behind(cursor) -> COME_TO_DONE() }; break
    :: d_step { row_status == ENDED && cursor <= row_length ->
            COPY(seen, row_text, cursor, row_length);
            cursor = row_length;
            COME_TO_DONE() };
        break
    od;
    skip;
    d_step { CLEAR(seen); cursor = 0 }
}

init {
    atomic {
        run Network();
#ifndef NO_READER
        run Reader();
#endif
#ifdef WEB_IS_QUICK
        state_exists = true;
#else
        run Web();
#endif
        run Worker(1);
#if DELIVERIES > 1
        run Worker(2);
#endif
#if TERMINATORS > 0
        run Terminator(11, USER);
#endif
#if TERMINATORS > 1
        run Terminator(12, ADMIN);
#endif
#ifdef TAKEOVER
        run Reaper();
#endif
    }
    timeout;                            /* nobody can do anything any more */
    d_step {
        MUST(All_have_ended, _nr_pr == 2);      /* this one and the network */
        COMPARE(row_text, state_text, row_length);
        MUST(All_is_said, row_status == ENDED && row_published);
        MUST(All_is_said, state_end == row_length && same);
        KEEPS(One_commit, commits == 1);
        MUST(One_done, state_dones == 1 && state_done_at == row_length)
    }
}
