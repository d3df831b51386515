// What the tabs of one browser tell each other: {changed: conversationId}, where something was said in a conversation or it
// got another title; {user: name}, who is signed in, null: nobody. Nobody is told what they said themselves.

export const tabs = new BroadcastChannel("sluicegate");
