'use strict';

// A client of the message mesh on sofa-bolt-node alone: registers over HTTP, says hello, subscribes, consumes, is asked about
// its transactions, and publishes. Lines of its standard input are what it is told to do; their end is its own.
//
// Arguments (key=value): mesh=HOST:PORT, registration=HOST:PORT (none: registers nothing), app, name, wire=1|2, crc=on|off,
// groups=NAME/TOPIC/ROLE[/PREFETCH[/FILTER]];..., start=GROUP,... (what it subscribes to first; all by default), timeout_ms.
//
// Commands: `publish topic=T count=N first=N sizes=0,256 [window=8] [colour=blue] [key=on]`, `prepare topic=T group=G count=N
// first=N sizes=256` (the second phase is left to the check), `subscribe GROUP,...`.
//
// Message number n (of the id `name-n`) is answered `later` once when n % 7 is 3; a check of it is answered rollback when
// n % 3 is 0, commit when it is 1, and unknown once before commit when it is 2.

const crypto = require('crypto');
const http = require('http');
const net = require('net');
const readline = require('readline');
const bolt = require('sofa-bolt-node');
const { options, payload } = require('./wire');

const CLASS = 'fastmesh.push.v1';
const TIMEOUT_MS = Number(options.timeout_ms || 10000);
const HEARTBEAT_MS = 300;
const RETRY_MS = 50;

// Decoding: codec byte 11 is the one whose header section the library reads, and gives to this function.
const stock = bolt.codec.protobuf;
bolt.codec.protobuf = {
  encode: stock.encode,
  decode(buffer, className, ctx) {
    const headers = ctx.headers || {};
    if (className !== CLASS && !headers['fm.result']) return stock.decode(buffer, className, ctx);
    return { headers, content: Buffer.from(buffer.read(ctx.contentLen)) };
  },
};

// Encoding: what has a class name is a command, written as it says.
class Push extends bolt.BaseRpcCmd {
  constructor(headers, content = Buffer.alloc(0), oneway = false) {
    super({ timeout: TIMEOUT_MS, oneway });
    Object.assign(this, { headers, content, responseStatus: 0 });
  }
  get className() { return CLASS; }
  serializeHeader(out) {
    for (const text of Object.entries(this.headers).flat()) {
      out.putInt(Buffer.byteLength(text));
      out.put(Buffer.from(text));
    }
  }
  serializeContent(out) { out.put(this.content); }
}

const errors = [];
const waiting = new Map();
const seen = new Set();
const count = { got: 0, put: 0, checked: 0, asked: 0, oneways: 0, heartbeats: 0, acks: 0 };
const dialects = new Set();
let number = 0;
let leaving = false;

const say = (word, what) => console.log(word + ' ' + JSON.stringify(what));
const digest = content => crypto.createHash('sha256').update(content).digest('hex');
const pause = ms => new Promise(resolve => setTimeout(resolve, ms));

const [ hostname, port ] = options.mesh.split(':');
const socket = net.connect(Number(port), hostname);
socket.setNoDelay(true);
const encoder = bolt.encoder({ sentReqs: new Map(), codecType: 'protobuf' });
const decoder = bolt.decoder({ sentReqs: new Map(), codecType: 'protobuf' });
if (options.wire === '2') {
  encoder.protocolType = 'bolt2';
  encoder.boltVersion = options.crc === 'on' ? 2 : 1;
  encoder.crcEnable = options.crc === 'on';
}
encoder.pipe(socket).pipe(decoder);
for (const part of [ socket, encoder, decoder ]) part.on('error', err => errors.push(String(err.stack)));
socket.on('close', () => {
  if (!leaving) errors.push('the connection was lost');
  for (const { reject } of waiting.values()) reject(new Error('the connection was lost'));
  if (!leaving) end();
});

function ask(headers, content) {
  const id = number += 1;
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      waiting.delete(id);
      reject(new Error(headers['fm.op'] + ': no answer'));
    }, TIMEOUT_MS + 1000);
    waiting.set(id, {
      resolve: answer => { clearTimeout(timer); resolve(answer); },
      reject: err => { clearTimeout(timer); reject(err); },
    });
    encoder.writeRequest(id, new Push(headers, content), err => { if (err) reject(err); });
  });
}

decoder.on('response', answer => {
  const asked = waiting.get(answer.packetId);
  waiting.delete(answer.packetId);
  if (!asked) return errors.push('an answer to nothing: ' + answer.packetId);
  // An answer with a Bolt status has no headers here, but an error: ambiguous.
  if (answer.data.error) return asked.reject(answer.data.error);
  asked.resolve(answer.data.headers);
});
decoder.on('heartbeat', beat => { count.heartbeats += 1; encoder.writeHeartbeatAck(beat); });
decoder.on('heartbeat_ack', () => { count.acks += 1; });
decoder.on('request', asked => {
  const { headers, content } = asked.data;
  dialects.add([ asked.options.protocolType, asked.options.boltVersion || 0, asked.options.crcEnable ? 'crc' : 'plain' ].join('/'));
  const answer = said => encoder.writeResponse(asked, new Push(said), err => { if (err) errors.push(String(err)); });
  const op = headers['fm.op'];
  if (op === 'deliver') answer(consume(headers, content));
  else if (op === 'check') answer(check(headers, content));
  // The library does not say which requests are oneway. Nobody waits for an answer to this one.
  else if (op === 'goaway') count.oneways += 1;
  else answer({ 'fm.result': 'reject', 'fm.reason': 'not for a client: ' + op });
});

// Written down before it is answered: what was answered and is not here, was never consumed.
function consume(headers, content) {
  const id = headers['fm.id'];
  const once = headers['fm.group'] + ' ' + id;
  const later = Number(id.slice(id.lastIndexOf('-') + 1)) % 7 === 3 && !seen.has(once) && headers['fm.attempt'] === '1';
  seen.add(once);
  count.got += 1;
  say('GOT', {
    group: headers['fm.group'], topic: headers['fm.topic'], id, attempt: Number(headers['fm.attempt']), key: headers['fm.key'] || null,
    colour: headers['fm.colour'] || null, note: headers['h.note'] || null, empty: headers['h.empty'], said: later ? 'later' : 'consumed',
    size: content.length, digest: digest(content),
  });
  return later ? { 'fm.result': 'later', 'fm.retry_ms': String(RETRY_MS) } : { 'fm.result': 'consumed' };
}

function check(headers, content) {
  const id = headers['fm.id'];
  const rest = Number(id.slice(id.lastIndexOf('-') + 1)) % 3;
  const said = rest === 0 ? 'rollback' : rest === 2 && !seen.has('check ' + id) ? 'unknown' : 'commit';
  seen.add('check ' + id);
  count.checked += 1;
  say('CHECKED', { group: headers['fm.group'], id, said, size: content.length, digest: digest(content) });
  return { 'fm.result': said };
}

async function must(headers) {
  const answer = await ask(headers);
  if (answer['fm.result'] !== 'consumed') throw new Error(headers['fm.op'] + ': ' + JSON.stringify(answer));
}

async function put(mine, told, more) {
  const sizes = told.sizes.split(',').map(Number);
  const content = payload(options.name, mine, sizes[mine % sizes.length]);
  const headers = Object.assign({
    'fm.op': 'publish', 'fm.topic': told.topic, 'fm.id': options.name + '-' + mine, 'h.note': `grüße ✓ ${mine}`, 'h.empty': '',
  }, more);
  if (told.colour) headers['fm.colour'] = told.colour;
  if (told.key) headers['fm.key'] = 'key-' + (mine % 5);
  for (let retries = 0; ; retries += 1) {
    const answer = await ask(headers, content);
    if (answer['fm.result'] === 'consumed') {
      count.put += 1;
      if (answer['fm.id'] !== headers['fm.id']) throw new Error('the answer of ' + answer['fm.id'] + ' for ' + headers['fm.id']);
      say('PUT', { id: headers['fm.id'], topic: told.topic, broker: answer['fm.broker'], retries });
      return;
    }
    if (answer['fm.result'] !== 'later' || retries === 100) throw new Error('publish ' + mine + ': ' + JSON.stringify(answer));
    await pause(Number(answer['fm.retry_ms'] || 100));
  }
}

async function puts(told, more) {
  let next = Number(told.first);
  const last = next + Number(told.count);
  await Promise.all(Array.from({ length: Number(told.window || 8) }, async () => {
    while (next < last) await put(next++, told, more);
  }));
}

async function obey(line) {
  const [ word, ...rest ] = line.trim().split(' ');
  if (word === 'subscribe') {
    await must({ 'fm.op': 'subscribe', 'fm.group': rest[0] || '' });
    say('SUBSCRIBED', rest[0] || '');
    return;
  }
  const told = Object.fromEntries(rest.map(pair => pair.split('=')));
  if (word === 'publish') await puts(told, {});
  else if (word === 'prepare') await puts(told, { 'fm.tx': 'prepare', 'fm.group': told.group });
  else throw new Error('no such command: ' + line);
  say('DONE', { word, topic: told.topic, count: Number(told.count) });
}

function register() {
  const groups = options.groups.split(';').map(text => {
    const [ name, topic, role, prefetch, filter ] = text.split('/');
    const group = { name, topic, role };
    if (prefetch) group.prefetch = Number(prefetch);
    if (filter) group.filter = filter;
    return group;
  });
  const topics = (options.topics || '').split(',').filter(Boolean).map(name => ({ name }));
  if (options.registration === 'none') return Promise.resolve(groups);
  const body = JSON.stringify({ app: options.app, client: options.name, topics, groups });
  const [ host, at ] = options.registration.split(':');
  return new Promise((resolve, reject) => {
    const asked = http.request({ host, port: Number(at), path: '/v1/registrations', method: 'POST' }, answer => {
      let text = '';
      answer.on('data', more => { text += more; });
      answer.on('end', () => {
        if (answer.statusCode === 201 || answer.statusCode === 200) resolve(groups);
        else reject(new Error(`registration: ${answer.statusCode} ${text}`));
      });
    });
    asked.on('error', reject);
    asked.end(body);
  });
}

function end() {
  leaving = true;
  console.log(JSON.stringify(Object.assign({
    peer: 'push-node', name: options.name, errors: errors.length, first_errors: errors.slice(0, 5),
    dialects: [ ...dialects ].sort(),
  }, count)));
  process.exit(errors.length ? 1 : 0);
}

async function leave(under_way) {
  await Promise.allSettled(under_way);
  try {
    if (!errors.length) {
      await must({ 'fm.op': 'suspend' });
      leaving = true;
      encoder.writeRequest(number += 1, new Push({ 'fm.op': 'goaway', 'fm.reason': 'done' }, Buffer.alloc(0), true));
    }
  } catch (err) {
    errors.push(String(err));
  }
  socket.on('close', end);
  encoder.end();
}

async function main() {
  const groups = await register();
  await must({ 'fm.op': 'hello', 'fm.protocol': '1', 'fm.app': options.app, 'fm.client': options.name });
  const first = options.start === undefined ? [ ...new Set(groups.map(group => group.name)) ].join(',') : options.start;
  await must({ 'fm.op': 'subscribe', 'fm.group': first });
  const beating = setInterval(() => encoder.writeHeartbeat(number += 1, { timeout: TIMEOUT_MS }), HEARTBEAT_MS);
  const under_way = [];
  const lines = readline.createInterface({ input: process.stdin });
  lines.on('line', line => under_way.push(obey(line).catch(err => errors.push(String(err)))));
  lines.on('close', () => { clearInterval(beating); leave(under_way); });
  console.log('READY 0');
}

main().catch(err => { errors.push(String(err.stack)); end(); });
