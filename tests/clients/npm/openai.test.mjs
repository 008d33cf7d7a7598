// The openai npm SDK with zod, against a server at OCTAVO_URL that serves the demo model as `smollm2`.
import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.env.OCTAVO_URL}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model: "smollm2", temperature: 0, max_tokens: 24 };
const City = z.object({ name: z.string().max(12) });

test("models are listed and found", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, ["smollm2"]);
  assert.equal((await client.models.retrieve("smollm2")).owned_by, "octavo");
});

test("a chat and its stream say the same", async () => {
  const whole = await client.chat.completions.create({ ...greedy, messages });
  assert.match(whole.choices[0].message.content, /Paris/);
  const stream = await client.chat.completions.create({ ...greedy, messages, stream: true });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  assert.equal(text, whole.choices[0].message.content);
});

test("the stream helper gathers the events", async () => {
  const runner = client.chat.completions.stream({ ...greedy, messages, stream_options: { include_usage: true } });
  let deltas = "";
  runner.on("content", (delta) => (deltas += delta));
  const final = await runner.finalChatCompletion();
  assert.equal(deltas, final.choices[0].message.content);
  assert.ok(final.usage.completion_tokens > 0);
});

test("a stream that is left ends without an error", async () => {
  const stream = await client.chat.completions.create({ ...greedy, messages, max_tokens: 1000, stream: true });
  for await (const _ of stream) break;
});

test("a demanded tool is called, whole and streamed", async () => {
  const tools = [zodFunction({ name: "get_weather", parameters: z.object({ city: z.string().max(12) }) })];
  const asked = { ...greedy, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 60 };
  const whole = await client.chat.completions.parse(asked);
  const call = whole.choices[0].message.tool_calls[0];
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  assert.deepEqual(Object.keys(call.function.parsed_arguments), ["city"]);
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.deepEqual(final.choices[0].message.tool_calls[0].function.parsed_arguments, call.function.parsed_arguments);
});

test("a tool is run and its result taken", async () => {
  const tool = {
    type: "function",
    function: {
      name: "get_weather",
      parameters: {
        type: "object",
        properties: { city: { type: "string", maxLength: 12 } },
        required: ["city"],
        additionalProperties: false,
      },
      function: ({ city }) => `sunny in ${city}`,
      parse: JSON.parse,
    },
  };
  const asked = { ...greedy, messages, tools: [tool], tool_choice: "required", parallel_tool_calls: false, max_tokens: 60 };
  const runner = client.chat.completions.runTools(asked, { maxChatCompletions: 2 });
  await runner.done();
  assert.ok(runner.messages.some((message) => message.role === "tool"));
});

test("structured output is parsed by zod", async () => {
  const asked = { ...greedy, messages, max_tokens: 60, response_format: zodResponseFormat(City, "city") };
  const { parsed } = (await client.chat.completions.parse(asked)).choices[0].message;
  assert.ok(City.parse(parsed));
});

test("responses are made, streamed and kept", async () => {
  const asked = { model: "smollm2", input: "What is the capital of France?", temperature: 0, max_output_tokens: 24 };
  const made = await client.responses.create(asked);
  assert.match(made.output_text, /Paris/);
  const final = await client.responses.stream(asked).finalResponse();
  assert.equal(final.output_text, made.output_text);
  assert.equal((await client.responses.retrieve(made.id)).id, made.id);
  await client.responses.delete(made.id);
});

test("a batch is made of a file", async () => {
  const body = { ...greedy, messages };
  const line = JSON.stringify({ custom_id: "a", method: "POST", url: "/v1/chat/completions", body });
  const file = await client.files.create({ file: new File([line], "requests.jsonl"), purpose: "batch" });
  const endpoint = "/v1/chat/completions";
  let batch = await client.batches.create({ input_file_id: file.id, endpoint, completion_window: "24h" });
  for (let i = 0; i < 300 && !["completed", "failed"].includes(batch.status); i++) {
    await new Promise((resolve) => setTimeout(resolve, 200));
    batch = await client.batches.retrieve(batch.id);
  }
  assert.equal(batch.status, "completed");
  assert.match(await (await client.files.content(batch.output_file_id)).text(), /Paris/);
});

test("embeddings come as numbers", async () => {
  const answer = await client.embeddings.create({ model: "smollm2", input: ["paper", "ink"] });
  const norms = answer.data.map(({ embedding }) => Math.hypot(...embedding));
  for (const norm of norms) assert.ok(Math.abs(norm - 1) < 1e-4);
});

test("mistakes are the SDK's own errors", async () => {
  await assert.rejects(client.models.retrieve("nope"), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ ...greedy, messages, temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
});
