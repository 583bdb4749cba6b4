// The official npm client under remote control: one JSON command a line on stdin, one JSON answer on stdout.
// A command is {client, scenario, params, options}; {abort: true} is what an AbortController does to the
// command that is under way. It knows nothing of the gateway and judges nothing: the tests do.

import { createInterface } from 'node:readline';
import OpenAI from 'openai';
import { standardResponseFormat } from 'openai/helpers/standard-schema';

const SCHEMA = {
  type: 'object',
  properties: { name: { type: 'string' }, people: { type: 'integer' } },
  required: ['name', 'people'],
  additionalProperties: false,
};
// What zod and its like offer, without one of them.
const City = {
  '~standard': {
    version: 1,
    vendor: 'tests',
    validate: (value) => ({ value }),
    jsonSchema: { input: () => SCHEMA },
  },
};

const scenarios = {
  async create(client, params, options) {
    const call = client.chat.completions.create(params, options);
    const { data, response, request_id } = await call.withResponse();
    const headers = Object.fromEntries(response.headers);
    return { answer: data, headers, request_id, own_id: data._request_id };
  },

  async chunks(client, params, options) {
    const call = client.chat.completions.create({ ...params, stream: true }, options);
    const { data, response } = await call.withResponse();
    return { chunks: await all(data), headers: Object.fromEntries(response.headers) };
  },

  async lines(client, params, options) {
    const response = await client.chat.completions.create({ ...params, stream: true }, options).asResponse();
    return { lines: (await response.text()).split('\n'), headers: Object.fromEntries(response.headers) };
  },

  // The helper that joins a stream into one completion, which is stricter than create().
  async helper(client, params, options) {
    const stream = client.chat.completions.stream(params, options);
    const seen = { kinds: new Set(), calls: [] };
    for (const kind of ['chunk', 'content', 'content.done', 'message', 'chatCompletion', 'end']) {
      stream.on(kind, () => seen.kinds.add(kind));
    }
    stream.on('tool_calls.function.arguments.done', (call) => seen.calls.push(call));
    const answer = await stream.finalChatCompletion();
    return { answer, usage: await stream.totalUsage(), kinds: [...seen.kinds], calls: seen.calls };
  },

  async parse(client, params, options) {
    const format = standardResponseFormat(City, 'city');
    return client.chat.completions.parse({ ...params, response_format: format }, options);
  },

  async parseStream(client, params, options) {
    const format = standardResponseFormat(City, 'city');
    const stream = client.chat.completions.stream({ ...params, response_format: format }, options);
    return stream.finalChatCompletion();
  },

  // The helper that calls the functions of its caller by itself until there is a final answer.
  async runTools(client, params, options) {
    const weather = (given) => `sunny in ${given.city}`;
    const parameters = { type: 'object', properties: { city: { type: 'string' } } };
    const tool = { name: 'weather', description: 'Now', parse: JSON.parse, parameters, function: weather };
    const tools = [{ type: 'function', function: tool }];
    const runner = client.chat.completions.runTools({ ...params, tools }, options);
    const content = await runner.finalContent();
    return { content, messages: runner.messages, usage: await runner.totalUsage() };
  },

  async embeddings(client, params, options) {
    const { data, request_id } = await client.embeddings.create(params, options).withResponse();
    return { answer: data, request_id };
  },

  async models(client) {
    return all(client.models.list());
  },

  async model(client, { id }, options) {
    return client.models.retrieve(id, options);
  },

  async responses(client, params, options) {
    return client.responses.create(params, options);
  },

  // Leaves a stream after its first chunk: by the stream's controller, or out of the loop.
  async leave(client, { how, ...params }, options) {
    const stream = await client.chat.completions.create({ ...params, stream: true }, options);
    for await (const chunk of stream) {
      if (how === 'break') break;
      stream.controller.abort();
    }
  },

  async leaveHelper(client, params, options) {
    const stream = client.chat.completions.stream(params, options);
    stream.once('content', () => stream.abort());
    return stream.finalChatCompletion();
  },

  async many(client, { count, ...params }, options) {
    const ask = async (_, number) => {
      const messages = [{ role: 'user', content: `number ${number}` }];
      return client.chat.completions.stream({ ...params, messages }, options).finalContent();
    };
    return Promise.all(Array.from({ length: count }, ask));
  },
};

async function all(items) {
  const found = [];
  for await (const item of items) found.push(item);
  return found;
}

function told(error) {
  const { message, status, code, type, param, requestID: request_id } = error;
  const is_api_error = error instanceof OpenAI.APIError;
  return { kind: error.constructor.name, is_api_error, message, status, code, type, param, request_id };
}

async function answered({ client, scenario, params, options }, signal) {
  try {
    return { value: await scenarios[scenario](new OpenAI(client), params, { ...options, signal }) };
  } catch (error) {
    return { error: told(error) };
  }
}

let controller;
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  if (command.abort) {
    controller.abort();
    continue;
  }
  controller = new AbortController();
  answered(command, controller.signal).then((answer) => console.log(JSON.stringify(answer)));
}
