// Follows one stream by the subscription, and prints what the client is given: one line of JSON for each result, then
// `{"complete": true}`, or `{"error": …}`. It leaves the stream when its standard input ends.
//
//     node follow.mjs URL TOKEN SESSION_ID [AFTER]

import { createClient } from "graphql-sse";

const [url, token, sessionId, after] = process.argv.slice(2);
const query = `subscription ($sessionId: ID!, $after: String) {
  streamEvents(sessionId: $sessionId, after: $after) {
    __typename
    ... on SessionEvent { id sessionId messageId }
    ... on PhaseEvent { id phase attempt }
    ... on ThinkingEvent { id content }
    ... on MessageEvent { id content }
    ... on DoneEvent { id status reason length thinkingLength sha256 }
  }
}`;

const say = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);

const client = createClient({ url, headers: { Authorization: `Bearer ${token}` }, retryAttempts: 0 });
const leave = client.subscribe(
  { query, variables: { sessionId, after } },
  {
    next: say,
    complete: () => { say({ complete: true }); process.exit(0); },
    error: (error) => { say({ error: String(error.message ?? error) }); process.exit(1); },
  },
);
process.stdin.resume().on("end", leave);
