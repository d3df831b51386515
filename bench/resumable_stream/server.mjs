// resumable-stream as its README has it, over node's own HTTP server. It knows no stop: the one here is made by hand, and
// reaches streams of this process only. PORT, MODEL_URL and REDIS_URL are taken from the environment.
import http from "node:http";
import { createClient } from "redis";
import { createResumableStreamContext } from "resumable-stream";

const publisher = createClient({ url: process.env.REDIS_URL });
const subscriber = createClient({ url: process.env.REDIS_URL });
await Promise.all([publisher.connect(), subscriber.connect()]);
const context = createResumableStreamContext({ waitUntil: () => {}, publisher, subscriber });
const running = new Map();

async function* events(model, messages, signal) {
  const answer = await fetch(`${process.env.MODEL_URL}/api/chat`, {
    method: "POST",
    body: JSON.stringify({ model, messages, stream: true }),
    signal,
  });
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of answer.body) {
    const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const said = JSON.parse(line);
      yield said.done
        ? 'event: done\ndata: {"reason": "stop"}\n\n'
        : `data: ${JSON.stringify({ content: said.message.content })}\n\n`;
    }
  }
}

function source(id, model, messages) {
  const control = new AbortController();
  running.set(id, control);
  return new ReadableStream({
    async start(out) {
      try {
        for await (const event of events(model, messages, control.signal)) out.enqueue(event);
      } catch (error) {
        if (!control.signal.aborted) throw error;
        out.enqueue('event: done\ndata: {"reason": "user"}\n\n');
      } finally {
        running.delete(id);
        out.close();
      }
    },
  });
}

async function body(request) {
  let text = "";
  for await (const chunk of request) text += chunk;
  return JSON.parse(text || "{}");
}

http
  .createServer(async (request, response) => {
    if (request.url === "/chat") {
      const { id, model, messages } = await body(request);
      const stream = await context.createNewResumableStream(id, () => source(id, model, messages));
      response.writeHead(200, { "Content-Type": "text/event-stream", "Transfer-Encoding": "chunked" });
      response.flushHeaders();
      for await (const event of stream) {
        if (!response.write(event)) await new Promise((resolve) => response.once("drain", resolve));
      }
      response.end();
    } else if (request.url === "/stop") {
      const { id } = await body(request);
      running.get(id)?.abort();
      response.end("{}");
    } else {
      response.end("ok");
    }
  })
  .listen(Number(process.env.PORT), "127.0.0.1");
