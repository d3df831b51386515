/* The stop protocol of Sluicegate, and what recovers it after a fault, for the model checker Spin.
 *
 * One session: its database row, its Redis state, everybody who races for it, and one fault. What is
 * claimed is invariants 1 to 3 and 5 of the design: Seen = saved, Stop is a fence, One ending, No crash
 * loses what was seen. README.md says how the steps map to code; check.py runs the scenarios and takes
 * out one guard after the other.
 *
 * Read it in this order: the claims, the guards, the row and its statements, the Redis state and its
 * verbs, then the processes, the faults last. What is written in CAPITALS with parentheses is one step:
 * one SQL statement or one Lua script (or MULTI), and nothing else can happen inside it.
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
#ifndef REAPERS
#define REAPERS 0           /* 0 to 2 reapers; needed where somebody may be lost */
#endif
#ifndef CRASH
#define CRASH 0             /* who may die, once, before any step: 1 a worker, 11 a caller of terminate, 20 a reaper */
#endif
/* BEATS          workers write heartbeats with checkpoints, and hear of stops by them
 * SILENCE        an upstream may fall silent for ever (only with a terminator, as a timeout is one)
 * DRAIN          the first worker may hand its session over
 * WEB_IS_QUICK   the web process's OPEN comes before everything else
 * ANY_READER     what is in the log has been seen at once; instead of a reader with a pace of its own
 * NO_READER      without any reader, who decides nothing; for the search for endless runs
 * VISIBLE_ONLY   see the claims
 * and the faults, beside CRASH:
 * SLOW           the first worker is taken for lost, at any time, and goes on
 * EMPTIED        Redis loses all it has, once, at any time
 * AWAY           Redis cannot be reached, by whoever tries, whenever he tries
 * ANSWER_LOST    the database has done what it was told, and the answer does not arrive
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
mtype = { OK, ABSENT, STALE, FENCED, BEHIND }; /* answers of the verbs */

/* ---- The claims ---------------------------------------------------------------------------- */

mtype = {
    /* What a user could notice. The number is that of the invariant in the design. */
    Seen_is_saved,          /* 1, 5: a reader that came to done was sent exactly the row's text */
    Checkpoint_is_saved,    /* 5: of several faults at once, none takes what was checkpointed before them */
    Nothing_lost,           /* 1: a natural end leaves none of its worker's text out of the log */
    Same_outcome,           /* 3: every receipt, and every process, says what the row says */
    Stop_on_record,         /* 3: who is on record as having stopped it did stop it */
    Done_after_commit,      /* 1: done is seen only when the row has ended */
    One_done,               /* 3: and there is one */
    All_have_ended,         /* 3, 6: nobody waits for ever, the session ends */
    All_is_said,            /* 1: at the end the row is ended and published, and the log is its text */
    /* How the protocol brings that about. */
    Stop_is_a_fence,        /* 2: nothing enters the log after the first fence */
    First_fence_decides,    /* 2, 3: the row has the first fence's reason and length */
    One_commit,             /* 3: the session leaves ACTIVE once */
    One_owner,              /* 3: it is claimed only while it is ACTIVE and nobody's, and taken only from who is lost */
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

/* A fence that Redis has lost, or that an ending could do without, decides nothing any more. */
#if defined(EMPTIED) || defined(AWAY)
#define KEEPS_OF_FENCE(claim, condition) skip
#else
#define KEEPS_OF_FENCE(claim, condition) KEEPS(claim, condition)
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

#ifdef NO_RELEASE_EPOCH
#define release_epoch_ok(e)     true
#else
#define release_epoch_ok(e)     (row_epoch == e)
#endif

#ifdef NO_RECORD_FIRST_WINS
#define record_ok               (row_status == ACTIVE)
#else
#define record_ok               (row_status == ACTIVE && row_stop == NO_REASON)
#endif

#ifdef NO_BEAT_EPOCH
#define beat_epoch_ok(e)        true
#else
#define beat_epoch_ok(e)        (row_epoch == e)
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
#ifdef NO_COMMIT_CHECKPOINT
#define commit_checkpoint_ok(l) true
#else
#define commit_checkpoint_ok(l) (row_checkpoint_length <= l)
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

/* A state of an older epoch than its caller's is not that caller's: ABSENT, and not STALE. */
#ifdef OLDER_IS_STALE
#define is_absent(e)            (!state_exists)
#else
#define is_absent(e)            (!state_exists || state_epoch < e)
#endif

#ifdef NO_APPEND_EPOCH
#define append_is_absent(e)     (!state_exists)
#define append_is_stale(e)      false
#else
#define append_is_absent(e)     is_absent(e)
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
#define fence_is_absent(e)      (!state_exists)
#define fence_is_stale(e)       false
#else
#define fence_is_absent(e)      is_absent(e)
#define fence_is_stale(e)       (state_epoch != e)
#endif
#ifdef NO_FENCE_EXPECTED_END
#define fence_is_behind(end)    false
#else
#define fence_is_behind(end)    (state_end != end)
#endif

#ifdef NO_RENEW_EPOCH
#define renew_is_stale(e)       false
#else
#define renew_is_stale(e)       (state_epoch > e)
#endif

#ifdef NO_FINISH_ONCE
#define finish_is_repeated      false
#else
#define finish_is_repeated      (state_dones > 0)
#endif
#ifdef NO_FINISH_FENCE
#define finish_fences           false
#else
#define finish_fences           (state_fence == NO_REASON)
#endif

#if defined(CHECKPOINT_UNACKNOWLEDGED)
#define checkpoint_upto         length
#else
#define checkpoint_upto         acked
#endif

/* The rebuild's OPEN replaces a state that somebody with an older epoch has made, fence and all. */
#ifdef NO_REBUILD_ANEW
#define rebuild_creates(e)      (!state_exists)
#else
#define rebuild_creates(e)      (!state_exists || state_epoch < e)
#endif

/* Whoever settles leaves to a living owner what Redis has lost. */
#ifdef NO_OWNER_ENDS_IT
#define left_to_owner           false
#else
#define left_to_owner           (owner != NOBODY && owner != silent)
#endif
/* And begins again where the log is shorter than the fence said, whoever has made a state since. */
#if defined(NO_SETTLE_RETRY)
#define log_is_lost             false
#elif defined(SETTLE_RETRY_IF_ABSENT)
#define log_is_lost             (got < at && !state_exists)
#else
#define log_is_lost             (got < at)
#endif

#ifdef DRAIN_ACKNOWLEDGED
#define drain_upto  acked
#else
#define drain_upto  length
#endif

/* Whoever goes on from a text, or commits it, takes the longer of log and checkpoint. */
#if defined(LOG_ALONE)
#define log_is_taken    true
#elif defined(CHECKPOINT_ALONE)
#define log_is_taken    false
#else
#define log_is_taken    (got >= length)
#endif

#ifdef UNFENCED_ACKNOWLEDGED
#define unfenced_end    acked
#else
#define unfenced_end    length
#endif

#ifdef END_AT_FENCE_NOT_SEEN
#define worker_end              at
#else
#define worker_end              (at > seen -> at : seen)
#endif

/* ---- The database row ---------------------------------------------------------------------- */

mtype row_status = ACTIVE;
byte  row_epoch, row_owner;
mtype row_stop;                     /* the recorded stop request */
byte  row_checkpoint_length;
Text  row_checkpoint;
mtype row_reason;                   /* these three are set by COMMIT */
byte  row_length;
Text  row_text;
bool  row_published;

bool  revoked;                      /* Celery's revoke: messages not yet started never will be */
byte  waiting;                      /* bit w: worker w's message is on its way, or it has not claimed yet */
byte  last_worker;                  /* how many there have been */

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

/* ---- Faults --------------------------------------------------------------------------------- */

byte  crashed;                      /* who has died */
byte  silent;                       /* whose lease and heartbeat are old */
byte  faults;                       /* how many there have been */
byte  kept;                         /* the checkpoint's length when the last of them came */
#define SEVERAL_FAULTS  (faults > 1)

/* ---- Kept for the claims alone; no process decides by them ---------------------------------- */

mtype first_fence;
byte  first_fence_end;
byte  commits;
bool  session_is_free = true;       /* never claimed, or released */
mtype receipt_reason;               /* the first receipt */
byte  receipt_length;
#ifdef ANY_READER
Text  shown;
byte  shown_length;
#define shown_length_kept   (shown_length < kept -> shown_length : kept)
#endif

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

/* SELECT. What it read stays in status, read_epoch, owner, stop; if the session has ended, this is the
 * outcome that the process reports. */
inline READ() {
    d_step { read_row() }
}

inline read_row() {
    status = row_status; read_epoch = row_epoch; owner = row_owner; stop = row_stop;
    if
    :: status == ENDED -> SAY(row_reason, row_length)
    :: else
    fi
}

/* The same, with the checkpoint, which stays in text and length. */
inline READ_WITH_TEXT() {
    d_step { read_row(); CLEAR(text); take_checkpoint() }
}

inline take_checkpoint() {
    COPY(text, row_checkpoint, 0, row_checkpoint_length);
    length = row_checkpoint_length
}

/* UPDATE ... SET epoch = ? + 1, owner = me WHERE status = ACTIVE AND epoch = ? AND owner IS NULL; with the
 * checkpoint, read in the same transaction. */
inline CLAIM() {
    d_step {
        if
        :: claim_status_ok && claim_epoch_ok(read_epoch) && claim_owner_ok ->
            KEEPS(One_owner, row_status == ACTIVE && session_is_free);
            session_is_free = false;
            row_epoch = read_epoch + 1; row_owner = me; epoch = row_epoch; won = true;
            take_checkpoint()
        :: else -> won = false
        fi;
        waiting = waiting & ~(1 << me);
        printf("%d CLAIM: won %d, epoch %d, checkpoint %d\n", me, won, epoch, length)
    }
}

/* UPDATE ... SET owner = NULL WHERE status = ACTIVE AND epoch = ? AND owner IS NOT NULL. */
inline RELEASE(e) {
    d_step {
        if
        :: row_status == ACTIVE && release_epoch_ok(e) && row_owner != NOBODY ->
            KEEPS(One_owner, row_owner == silent || row_owner == me);
            row_owner = NOBODY; session_is_free = true; won = true
        :: else -> won = false
        fi;
        printf("%d RELEASE epoch %d: won %d\n", me, e, won)
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

/* A heartbeat: UPDATE ... SET checkpoint = ? WHERE status = ACTIVE AND epoch = mine RETURNING stop. */
inline BEAT(upto) {
    d_step {
        stop = NO_REASON;
        if
        :: row_status == ACTIVE && beat_epoch_ok(epoch) ->
            if
            :: row_checkpoint_length < upto ->
                COPY(row_checkpoint, text, 0, upto); row_checkpoint_length = upto
            :: else
            fi;
            stop = row_stop; won = true
        :: else -> won = false
        fi;
        printf("%d BEAT epoch %d, checkpoint %d: won %d, stop %e\n", me, epoch, row_checkpoint_length, won, stop)
    }
}

/* Only a heartbeat that has something to write or to hear changes anything. */
#ifdef NO_BEAT_NEWS
#define stop_is_news    false
#else
#define stop_is_news    (row_stop != NO_REASON)
#endif
#define beat_matters(upto) \
    (row_status == ENDED || row_epoch != epoch || stop_is_news || row_checkpoint_length < upto)

/* UPDATE ... SET status, reason, length, text WHERE status = ACTIVE AND epoch = ?, and no checkpoint is longer. */
inline COMMIT(e, length_) {
    d_step { commit_row(e, length_) }
}

/* The owner first reads the row: of its text and the checkpoint it takes the longer. Nobody else writes
 * checkpoints of its epoch, so the two are one step here. */
inline COMMIT_BY_OWNER() {
    d_step {
        if
        :: row_epoch == epoch && row_checkpoint_length > at -> take_checkpoint(); at = length
        :: else
        fi;
        commit_row(epoch, at)
    }
}

inline commit_row(e, length_) {
    if
    :: commit_status_ok && commit_epoch_ok(e) && commit_checkpoint_ok(length_) ->
        row_status = ENDED;
        row_reason = why;
        row_length = length_;
        COPY(row_text, text, 0, row_length);
        commits++; won = true;
        KEEPS(One_commit, commits == 1);
        KEEPS_OF_FENCE(First_fence_decides, row_reason == first_fence && row_length == first_fence_end);
        MUST(Stop_on_record, row_reason == STOP || row_reason == row_stop);
        COMPARE(row_text, row_checkpoint, row_checkpoint_length);
        MUST(Checkpoint_is_saved, row_length >= row_checkpoint_length && same);
        same = 0;
        compare_shown()
    :: else -> won = false
    fi;
    printf("%d COMMIT epoch %d, %e, length %d: won %d\n", me, e, why, length_, won);
    if
    :: won -> SAY(row_reason, row_length)
    :: else
    fi
}

/* UPDATE ... SET published. */
inline MARK_PUBLISHED() { row_published = true }

/* ---- Verbs: one Lua script each. The answer is in `answer`, `at` (an end), `why` (a reason) --- */

inline OPEN(e) {
    d_step {
        at = 0; why = NO_REASON;
        if
        :: state_exists && open_is_stale(e) -> answer = STALE
        :: else ->
            answer = OK;
            if
            :: open_creates -> make_state()
            :: else
            fi;
            state_epoch = open_epoch(e);
            at = state_end; why = state_fence;
            if
            :: state_fence != NO_REASON -> answer = FENCED
            :: else
            fi
        fi;
        printf("%d OPEN %d: %e, end %d\n", me, e, answer, at)
    }
}

inline make_state() {
    state_exists = true; state_end = 0; state_fence = NO_REASON; state_cuts = 0; state_dones = 0; state_done_at = 0;
    CLEAR(state_text)
}

/* With ANY_READER: some reader has seen all that was ever in a log, and it agrees with the row. */
inline SHOW() {
#ifdef ANY_READER
    k = 0;
    do
    :: k < state_end && k < shown_length ->
        MUST(Seen_is_saved, SEVERAL_FAULTS || shown.token[k] == state_text.token[k]);
        MUST(Checkpoint_is_saved, k >= kept || shown.token[k] == state_text.token[k]);
        k++
    :: k < state_end && k >= shown_length -> shown.token[k] = state_text.token[k]; shown_length++; k++
    :: else -> k = 0; break
    od;
    compare_shown()
#else
    skip
#endif
}

inline compare_shown() {
#ifdef ANY_READER
    if
    :: row_status == ENDED && SEVERAL_FAULTS ->
        at = shown_length_kept; COMPARE(shown, row_text, at); at = state_end;
        MUST(Checkpoint_is_saved, row_length >= kept && same)
    :: row_status == ENDED && !SEVERAL_FAULTS ->
        COMPARE(shown, row_text, shown_length);
        MUST(Seen_is_saved, shown_length <= row_length && same)
    :: else
    fi;
    same = 0
#else
    skip
#endif
}

/* The batch is what `source` has from `start` to `upto`. */
inline APPEND(e, start, upto, source) {
    d_step {
        at = 0; why = NO_REASON;
        append_batch(e, start, upto, source);
        printf("%d APPEND epoch %d, from %d to %d: %e, end %d\n", me, e, start, upto, answer, at)
    }
}

inline append_batch(e, start, upto, source) {
    if
    :: append_is_absent(e) -> answer = ABSENT
    :: else -> if
    :: append_is_stale(e) -> answer = STALE
    :: else -> if
    :: append_is_fenced -> answer = FENCED; at = state_end; why = state_fence
    :: else -> if
    :: append_is_behind(start) -> answer = BEHIND; at = state_end
    :: else ->
        KEEPS_OF_FENCE(Stop_is_a_fence, first_fence == NO_REASON);
        k = start;
        do
        :: k < upto -> state_text.token[state_end] = source.token[k]; state_end++; k++
        :: else -> k = 0; break
        od;
        state_cuts = state_cuts | (1 << state_end);
        answer = OK; at = state_end;
        SHOW()
    fi fi fi fi
}

/* A lost log, made again with all its text. A state of the caller's own epoch stays: it was made by the
 * same call, whose answer was lost, or for somebody who took the owner for lost. */
inline REBUILD(e, upto, source) {
    d_step {
        at = 0; why = NO_REASON;
        if
        :: state_exists && state_epoch > e -> answer = STALE
        :: else ->
            if
            :: rebuild_creates(e) ->
                make_state();
                COPY(state_text, source, 0, upto);
                state_end = upto;
                state_cuts = (upto > 0 -> 1 << upto : 0);
                SHOW()
            :: else
            fi;
            state_epoch = e; at = state_end;
            if
            :: state_fence != NO_REASON -> answer_fence()
            :: else -> answer = OK
            fi
        fi;
        printf("%d REBUILD epoch %d, to %d: %e, end %d\n", me, e, upto, answer, at)
    }
}

/* A terminator's first FENCE names neither epoch nor end. */
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

/* The FENCE of a worker that was told to stop, and of whoever settles, names the epoch. */
inline FENCE_AT(e, reason) {
    d_step {
        at = 0; why = NO_REASON;
        if
        :: fence_is_absent(e) -> answer = ABSENT
        :: else -> if
        :: fence_is_stale(e) -> answer = STALE
        :: else -> if
        :: fence_is_taken -> answer_fence()
        :: else -> take_fence(reason)
        fi fi fi;
        printf("%d FENCE %e epoch %d: %e %e, end %d\n", me, reason, e, answer, why, at)
    }
}

/* A worker's FENCE, when its upstream has ended, names its epoch and the end that it expects. */
inline FENCE_COMPLETE(e, end, source) {
    d_step {
        at = 0; why = NO_REASON;
        if
        :: fence_is_absent(e) -> answer = ABSENT
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

/* The lease renewal; it says which sessions may not go on. */
inline RENEW(e) {
    d_step {
        at = 0; why = NO_REASON;
        if
        :: is_absent(e) -> answer = ABSENT
        :: else -> if
        :: renew_is_stale(e) -> answer = STALE
        :: else -> if
        :: state_fence != NO_REASON -> answer_fence()
        :: else -> answer = OK
        fi fi fi;
        printf("%d RENEW epoch %d: %e\n", me, e, answer)
    }
}

#define renew_matters(e)    (!state_exists || state_epoch != e || state_fence != NO_REASON)

inline FINISH(length_) {
    d_step {
        if
        :: !state_exists && row_status == ENDED ->      /* lost: made again, with all its text */
            make_state();
            state_exists = true; state_epoch = row_epoch;
            COPY(state_text, row_text, 0, row_length);
            state_end = row_length;
            state_cuts = (row_length > 0 -> 1 << row_length : 0)
        :: else
        fi;
        if
        :: !state_exists || state_end > length_
        :: else ->
            if
            :: finish_is_repeated
            :: else -> state_dones++; state_done_at = length_
            fi;
            if
            :: finish_fences -> state_fence = row_reason
            :: else
            fi
        fi;
        printf("%d FINISH %d: end %d\n", me, length_, state_end)
    }
}

/* XRANGE: the whole log, by a process that will go on from it or commit it. `text` has the checkpoint
 * already; the longer of the two stays. */
inline READ_LOG() {
    d_step {
        got = (state_exists -> state_end : 0);
        if
        :: log_is_taken -> COPY(text, state_text, 0, got); length = got
        :: else
        fi;
        printf("%d READ_LOG: %d of %d\n", me, got, length)
    }
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
#if CRASH > 0
    atomic { FINISH(length_); FINISH(length_) };
    MARK_PUBLISHED()
#else
    atomic { FINISH(length_); FINISH(length_); MARK_PUBLISHED() }
#endif
}

/* Whoever commits, publishes; where answers get lost also whoever finds that it was committed before. */
#ifdef ANSWER_LOST
#define is_mine_to_publish  (won || (row_status == ENDED && !row_published))
#else
#define is_mine_to_publish  won
#endif
inline PUBLISH_IF_NEEDED() {
    if
    :: is_mine_to_publish ->
#ifdef AWAY
        if
        :: PUBLISH(row_length)
        :: skip                         /* left to the reaper */
        fi
#else
        PUBLISH(row_length)
#endif
    :: else
    fi
}

/* It names the row's epoch: a state of an older one, made by somebody who was late, has not the text. */
#ifdef NO_SETTLE_EPOCH
#define SETTLE_FENCE(reason)    FENCE(reason)
#else
#define SETTLE_FENCE(reason)    FENCE_AT(read_epoch, reason)
#endif

/* FENCE and COMMIT on behalf of a worker that is not there. Comes back when the session has ended, or
 * where its owner is to end it. */
inline SETTLE(reason) {
    do
    :: READ_WITH_TEXT();
        if
        :: status == ENDED -> break
        :: else
        fi;
#ifdef COMMIT_WITHOUT_FENCE
        d_step { why = reason; at = state_end };
#else
        if
        :: SETTLE_FENCE(reason);
            if
            :: answer == ABSENT && left_to_owner -> break
            :: answer == ABSENT && !left_to_owner -> OPEN(read_epoch); SETTLE_FENCE(reason)
            :: else
            fi;
            if
            :: answer != FENCED -> goto settle_again
            :: else
            fi
#ifdef AWAY
        :: read_epoch == 0 -> d_step { at = length; why = reason }; goto settle_commit  /* the row has all its text */
        :: break                        /* it is recorded, and will take effect */
#endif
        fi;
#endif
        READ_LOG();
        if
        :: log_is_lost -> goto settle_again
        :: else
        fi;
#ifdef COMMIT_OWN_REASON
        why = my_reason;
#endif
#ifdef PUBLISH_BEFORE_COMMIT
        PUBLISH(at);
#endif
settle_commit:
        COMMIT(read_epoch, length);
        PUBLISH_IF_NEEDED();
settle_again:
        skip
    od
}

/* What a heartbeat's answer does to its worker. */
inline heed_beat() {
    if
    :: !won -> goto leave               /* ended, or another's by now */
#ifndef NO_BEAT_NEWS
    :: won && stop != NO_REASON -> d_step { my_reason = stop; stop = 0; won = 0 }; goto ending
#endif
    :: else -> d_step { stop = 0; won = 0 }
    fi
}

/* The owner asks the row whether it is to go on. Only after that may it fill a state that is new. */
inline ASK() {
    READ();
    if
    :: status == ENDED || read_epoch != epoch -> goto leave
    :: status == ACTIVE && read_epoch == epoch && stop != NO_REASON -> my_reason = stop; goto unfenced
    :: else
    fi;
    d_step { status = 0; read_epoch = 0; owner = 0; stop = 0 }
}

/* A message for the next worker. */
inline REQUEUE() {
    atomic {
        last_worker++;
        waiting = waiting | (1 << last_worker);
        run Worker(last_worker)
    }
}

/* ---- The processes --------------------------------------------------------------------------- */

/* The web process has just committed the row; its OPEN may be slow. */
proctype Web() {
    byte me = 10, at;
    mtype answer, why;

    OPEN(0);
    d_step { at = 0; answer = 0; why = 0 }
}

/* One delivery of the session's message, and the generation that comes of it. */
proctype Worker(byte me) {
    mtype status, stop, answer, why, my_reason;
    byte read_epoch, epoch, owner, at, got;
    Text text;                          /* what earlier attempts left, then what the upstream sent */
    byte length;                        /* of that text */
    byte acked;                         /* how much of it the log is known to have */
    byte seen;                          /* how much of it some log was ever known to have */
    bool won, quiet;

    {
    if
    :: READ()
    :: revoked -> goto leave
    fi;
    if
    :: status == ENDED || owner_read_is_another -> goto leave
    :: status == ACTIVE && owner == NOBODY && stop != NO_REASON ->
        my_reason = stop;
        SETTLE(my_reason);
        goto leave
    :: else
    fi;
    CLAIM();
    if
    :: !won -> goto leave
    :: else
    fi;
#ifdef ANSWER_LOST
    if
    :: atomic { faults == 0 -> faults++; silent = me }; goto leave
    :: skip
    fi;
#endif
#if defined(AWAY) && defined(BEATS)
    if
    :: epoch == 1 && row_stop != NO_REASON -> BEAT(0); heed_beat()      /* while it waits for Redis */
    :: skip
    fi;
#endif
#ifdef READ_LOG_BEFORE_OPEN
    READ_LOG();
    OPEN(epoch);
#else
    OPEN(epoch);
    READ_LOG();
#endif
    d_step { seen = length; acked = (at < length -> at : length); read_epoch = 0; owner = 0; stop = 0; got = 0 };
    if
    :: answer == STALE -> goto leave
    :: answer == FENCED -> goto cut
    :: else
    fi;

going:
    do
    :: !quiet && length < LENGTH_OF(me) -> d_step { text.token[length] = TOKEN(me, length); length++ }
#ifdef SILENCE
    /* The upstream says nothing any more; only news can help. (Before somebody wants to stop it, that is
     * a pause as any other.) */
    :: !quiet && length < LENGTH_OF(me) && row_stop != NO_REASON -> quiet = true
#endif

    :: length > acked ->
        APPEND(epoch, acked, length, text);
        if
        :: answer == OK -> d_step { acked = at; seen = (at > seen -> at : seen) }
        :: answer == BEHIND ->
            KEEPS(Log_has_its_writer, at <= length);
            acked = at
        :: answer == FENCED -> goto cut
        :: answer == STALE -> goto leave
        :: answer == ABSENT -> goto ask
        fi

    /* No answer came in time. The script has run, or will run later; the worker will send again,
     * from the same start, with what has arrived in between. */
    :: d_step { length > acked && !late_append && unanswered_left > 0 ->
            unanswered_left--; late_append = true;
            late_epoch = epoch; late_start = acked; late_upto = length;
            COPY(late_text, text, acked, length);
            printf("%d APPEND epoch %d, from %d to %d: no answer\n", me, epoch, acked, length) }

#ifdef BEATS
    :: beat_matters(checkpoint_upto) ->
        BEAT(checkpoint_upto);
        heed_beat()
#ifdef AWAY
    :: beat_matters(length) ->          /* Redis is not well: everything is written */
        BEAT(length);
        heed_beat()
#endif
#endif

    /* The lease renewal, or the nudge before it, brings the news: fenced, another's, or gone. */
#ifndef NO_LEASE_NEWS
    :: renew_matters(epoch) ->
        RENEW(epoch);
        if
        :: answer == FENCED ->
            KEEPS(Log_has_its_writer, at <= length);
            my_reason = why; goto ending
        :: answer == STALE -> goto leave
        :: answer == ABSENT -> goto ask
        :: answer == OK
        fi
#endif

    /* The upstream has ended. The rest and the fence go out in one pipeline, so the fence is sent
     * before the append's answer is known. Its own answer may be lost too; then all is tried again. */
    :: !quiet && length >= LENGTH_OF(me) ->
        if
        :: length > acked ->
            APPEND(epoch, acked, length, text);
            if
            :: answer == OK -> d_step { acked = at; seen = (at > seen -> at : seen) }
            :: else
            fi
        :: else
        fi;
        FENCE_COMPLETE(epoch, length, text);
        if
        :: answer == FENCED -> goto cut
        :: answer == STALE -> goto leave
        :: answer == ABSENT -> goto ask
        :: answer == BEHIND ->
            KEEPS(Log_has_its_writer, at <= length);
            acked = at
        :: d_step { unanswered_left > 0 -> unanswered_left-- }
        fi
#ifdef AWAY
    :: !quiet && length >= LENGTH_OF(me) -> goto unfenced
#endif
#ifdef DRAIN
    :: me == 1 -> goto drain
#endif
    od;

    /* The state is gone. Ask the row before making it anew: a fence may have gone with it. */
ask:
#ifndef NO_ASK_BEFORE_REBUILD
    ASK();
#endif
#ifdef NO_ATOMIC_REBUILD
    OPEN(epoch);
    if
    :: answer == STALE -> goto leave
    :: else -> acked = (at < length -> at : length)
    fi;
#else
    REBUILD(epoch, length, text);
    if
    :: answer == STALE -> goto leave
    :: answer == FENCED -> goto cut
    :: answer == OK ->
        KEEPS(Log_has_its_writer, at <= length);
        d_step { acked = at; seen = (at > seen -> at : seen) }
    fi;
#endif
    if
    :: my_reason == NO_REASON -> goto going
    :: else
    fi;

    /* Told to stop. */
ending:
    if
    :: FENCE_AT(epoch, my_reason)
#ifdef AWAY
    :: goto unfenced
#endif
    fi;
    if
    :: answer == STALE -> goto leave
    :: answer == ABSENT -> goto ask
    :: answer == FENCED
    fi;

cut:
    atomic {
        at = worker_end;
#ifdef COMMIT_UNCUT
        at = length;
#endif
    };
    goto commit;

    /* Redis has no say: the worker holds all text, and the row alone decides. */
unfenced:
    atomic { at = unfenced_end; why = (my_reason == NO_REASON -> STOP : my_reason) };

commit:
#ifdef COMMIT_OWN_REASON
    why = STOP;
#endif
#ifdef PUBLISH_BEFORE_COMMIT
    PUBLISH(at);
#endif
    COMMIT_BY_OWNER();
#ifdef ANSWER_LOST
    if
    :: atomic { faults == 0 -> faults++ }; COMMIT_BY_OWNER()
    :: skip
    fi;
#endif
    PUBLISH_IF_NEEDED();
    if
    :: won
    :: else -> READ()                   /* not ended? then another has claimed it, and sees the fence */
    fi;
    goto leave;

#ifdef DRAIN
    /* The worker stops: what it has goes into the log, if that can be done in time, and into the row. */
drain:
    if
    :: length > acked ->
        APPEND(epoch, acked, length, text);
        if
        :: answer == OK -> d_step { acked = at; seen = (at > seen -> at : seen) }
        :: answer == FENCED -> goto cut
        :: answer == STALE -> goto leave
        :: answer == ABSENT -> goto ask
        :: answer == BEHIND -> acked = at; goto drain
        fi
    :: true
    fi;
    BEAT(drain_upto);
    if
    :: won -> RELEASE(epoch)
    :: else -> goto leave
    fi;
    if
    :: won -> REQUEUE()
    :: else
    fi;
#endif
    } unless { crashed == me };
leave: skip;
    d_step { status = 0; stop = 0; answer = 0; why = 0; my_reason = 0; read_epoch = 0; epoch = 0; owner = 0; at = 0;
        got = 0; CLEAR(text); length = 0; acked = 0; seen = 0; won = 0; quiet = 0;
        waiting = waiting & ~(1 << me) }
}

/* A caller of terminate: a user, an admin, a timeout. */
proctype Terminator(byte me; mtype my_reason) {
    mtype status, stop, answer, why, reason;
    byte read_epoch, owner, at, got, length;
    Text text;
    bool won;

    {
    RECORD(my_reason);
    READ();                             /* whose request is on record */
    if
    :: status == ENDED -> goto leave
    :: else
    fi;
#ifdef RECEIPT_FROM_FENCE_NOT_ROW
    FENCE(stop);
    d_step { SAY(why, at) };
#endif
#ifndef COMMIT_WITHOUT_FENCE
    if
    :: FENCE(stop)
#ifdef AWAY
    :: skip
#endif
    fi;
#endif
    if
    :: owner == NOBODY -> revoked = true    /* REVOKE */
    /* NUDGE is speed only, and no step: the worker may learn of the fence from here on. Then
     * wait, until the row has ended or for long enough, and look. */
    :: else
    fi;
#ifdef TERMINATOR_ONLY_WAITS
    row_status == ENDED;
    READ();
#else
    reason = stop;
    SETTLE(reason);
#endif
    } unless { crashed == me };
leave: skip;
    d_step { status = 0; stop = 0; answer = 0; why = 0; reason = 0; read_epoch = 0; owner = 0; at = 0;
        got = 0; CLEAR(text); length = 0; won = 0 }
}

/* What looks after lost workers, messages that were not claimed, and endings that were not published. */
proctype Reaper(byte me) {
    mtype status, stop, answer, why, my_reason;
    byte read_epoch, owner, at, got, length;
    Text text;
    bool won;

    {
    do
#ifndef REAPER_LEAVES_LOST
    :: d_step { row_status == ACTIVE && row_owner != NOBODY && row_owner == silent -> read_row() };
        my_reason = stop;
        if
        :: my_reason == NO_REASON && state_fence != NO_REASON -> my_reason = state_fence
        :: else
        fi;
        if
        :: my_reason != NO_REASON -> SETTLE(my_reason)
        :: else ->
            RELEASE(read_epoch);
            if
            :: won -> REQUEUE()
            :: else
            fi
        fi
#endif
#ifndef REAPER_LEAVES_UNCLAIMED
    :: d_step { row_status == ACTIVE && row_owner == NOBODY && waiting == 0 -> read_row() };
        if
        :: stop != NO_REASON -> my_reason = stop; SETTLE(my_reason)
        :: stop == NO_REASON && waiting == 0 -> REQUEUE()
        :: else
        fi
#endif
#ifndef REAPER_LEAVES_UNPUBLISHED
    :: row_status == ENDED && !row_published -> PUBLISH(row_length)
#endif
    :: row_status == ENDED && row_published -> break
    od
    } unless { crashed == me };
leave: skip;
    d_step { status = 0; stop = 0; answer = 0; why = 0; my_reason = 0; read_epoch = 0; owner = 0; at = 0;
        got = 0; CLEAR(text); length = 0; won = 0 }
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
    if
    :: SEVERAL_FAULTS ->
        at = (cursor < kept -> cursor : kept);
        COMPARE(seen, row_text, at);
        at = 0;
        MUST(Checkpoint_is_saved, same && row_length >= kept)
    :: else ->
        COMPARE(seen, row_text, cursor);
        MUST(Seen_is_saved, cursor == row_length && same)
    fi;
    same = 0
}

/* What has been committed, from the cursor on. */
inline take_rest() {
    if
    :: cursor < row_length -> COPY(seen, row_text, cursor, row_length); cursor = row_length
    :: else
    fi
}

/* Follows the log from entry to entry, like XREAD behind its cursor, and stops at done; or, at any
 * time after the end, takes the rest from the row. Losing its connection and coming back with its
 * cursor, on any node, is no step of its own: the cursor is all that it has. An entry may begin before
 * the cursor, in a log that was rebuilt; what lies behind the cursor is sent. Where text is missing before
 * done, the row has it. */
proctype Reader() {
    byte cursor, at;
    Text seen;

    do
    :: d_step { entry_behind(cursor) ->
            k = cursor + 1;
            do
            :: !(state_cuts & (1 << k)) -> k++
            :: else -> break
            od;
            same = k;                   /* the end of the next entry */
            COPY(seen, state_text, cursor, same);
            cursor = same; same = 0;
            printf("READER is at %d\n", cursor) }
    :: d_step { state_dones > 0 && !entry_behind(cursor) ->
#ifndef READER_IGNORES_GAP
            take_rest();
#endif
            COME_TO_DONE() };
        break
    :: d_step { row_status == ENDED -> take_rest(); COME_TO_DONE() };
        break
    od;
    skip;
    d_step { CLEAR(seen); cursor = 0 }
}

/* ---- Faults: each comes once, at any time, or never ------------------------------------------- */

inline FAULT() {
    faults++;
    if
    :: row_status == ACTIVE -> kept = row_checkpoint_length
    :: else
    fi
}

#if CRASH > 0
proctype Death() {
    if
    :: d_step { FAULT(); crashed = CRASH; silent = (CRASH < 10 -> CRASH : silent); printf("%d DIES\n", crashed) }
    :: skip
    fi
}
#endif

#ifdef SLOW
proctype Slowness() {
    if
    :: d_step { row_owner == 1 -> FAULT(); silent = 1; printf("1 is taken for LOST\n") }
    :: skip
    fi
}
#endif

#ifdef EMPTIED
proctype Emptying() {
    if
    :: d_step { FAULT(); make_state(); state_exists = false; state_epoch = 0; printf("Redis is EMPTIED\n") }
    :: skip
    fi
}
#endif

init {
    byte at;

    atomic {
        run Network();
#if !defined(NO_READER) && !defined(ANY_READER)
        run Reader();
#endif
#ifdef WEB_IS_QUICK
        state_exists = true;
#else
        run Web();
#endif
        last_worker = DELIVERIES;
        waiting = (DELIVERIES > 1 -> 6 : 2);
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
#if REAPERS > 0
        run Reaper(20);
#endif
#if REAPERS > 1
        run Reaper(21);
#endif
#if CRASH > 0
        run Death();
#endif
#ifdef SLOW
        run Slowness();
#endif
#ifdef EMPTIED
        run Emptying();
#endif
    }
    timeout;                            /* nobody can do anything any more */
    d_step {
#if REAPERS > 0 || CRASH == 0                   /* else nobody may be left to end it */
        MUST(All_have_ended, _nr_pr == 2);      /* this one and the network */
        MUST(All_is_said, row_status == ENDED && row_published);
        KEEPS(One_commit, commits == 1);
#endif
        at = (state_end < row_length -> state_end : row_length);
        COMPARE(row_text, state_text, at);
#if defined(EMPTIED) || defined(AWAY)
        /* The log may be gone, or end before the text, or lack done: then the row serves. */
        MUST(All_is_said, SEVERAL_FAULTS || (state_end <= row_length && same));
        MUST(One_done, state_dones == 0 || (state_dones == 1 && state_done_at == row_length))
#else
        MUST(All_is_said, state_end == row_length && same);
        MUST(One_done, state_dones == 1 && state_done_at == row_length)
#endif
    }
}
