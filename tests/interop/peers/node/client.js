'use strict';

// sofa-rpc-node's RpcClient (style `call`) and sofa-bolt-node's own (style `note`, oneway) under a bounded load; every
// answer is compared with what this call asked for.
//
// Arguments (key=value): target=HOST:PORT, name, service, codec=protobuf|hessian2, wire=1|2, crc=on|off, workers, sizes, styles,
// calls=N or seconds=S, pause_ms, timeout_ms, idle_ms (send heartbeats on a connection this quiet), quiet_ms (stay quiet that
// long after the calls), expect=ok|error with `afterwards`.

const bolt = require('sofa-bolt-node');
const { RpcClient } = require('sofa-rpc-node').client;
const { options, proto, payload, protocol, logger } = require('./wire');

const lines = [];
const codec = options.codec || 'protobuf';
const timeout = Number(options.timeout_ms || 5000);
const sizes = (options.sizes || '256').split(',').map(Number);
const styles = (options.styles || 'call').split(',');
const own = protocol(options.wire || '1', options.crc === 'on');
const client = new RpcClient({
  logger: logger(lines),
  connectionOpts: { protocol: own, proto, noDelay: true, connectTimeout: 3000, maxIdleTime: Number(options.idle_ms || 30000) },
});
const errors = [];
let number = 0;
let calls = 0;
let notes = 0;
let wrong = 0;
let expected = 0;
let heartbeats = 0;
client.on('error', err => errors.push('client: ' + err));

function consumer(service) {
  const [ interfaceName, version ] = service.split(':');
  return client.createConsumer({ interfaceName, version, serverHost: options.target, proto });
}

async function call(service, mine, size) {
  const data = payload(options.name, mine, size);
  const argument = codec === 'protobuf' ? { data } : data;
  const answer = await consumer(service).invoke('echo', [ argument ], { responseTimeout: timeout, codecType: codec });
  calls += 1;
  const got = Buffer.from(codec === 'protobuf' ? answer.data : answer || '');
  if (!got.equals(data)) {
    wrong += 1;
    errors.push(`call ${mine}: ${got.length} bytes that are not mine: ${got.toString('latin1', 0, 60)}`);
  }
}

let oneways;
async function note(mine, size) {
  if (!oneways) {
    bolt.setOptions({ proto });
    const [ hostname, port ] = options.target.split(':');
    oneways = new bolt.RpcClient({ logger: logger(lines), address: { hostname, port } });
    await oneways.ready();
  }
  oneways.oneway({
    serverSignature: options.service, methodName: 'note', args: [{ data: payload(options.name, mine, size) }],
    timeout, codecType: 'protobuf', requestProps: {},
  });
  notes += 1;
}

const pause = ms => new Promise(resolve => setTimeout(resolve, ms));

async function worker(end) {
  while (errors.length < 20) {
    number += 1;
    const mine = number;
    if (options.calls ? mine > Number(options.calls) : Date.now() >= end) return;
    const size = sizes[mine % sizes.length];
    const style = styles[Math.floor(mine / sizes.length) % styles.length];
    try {
      if (style === 'note') await note(mine, size);
      else await call(options.service, mine, size);
    } catch (err) {
      errors.push(`${style} ${mine} of ${size} bytes: ${err}`);
    }
    if (options.pause_ms) await pause(Number(options.pause_ms)); // Paces the load; nothing waits on it.
  }
}

async function refused() {
  for (let round = 0; round < Number(options.calls || 1); round += 1) {
    try {
      number += 1;
      await call(options.service, number, 64);
      errors.push('answered although nobody serves ' + options.service);
    } catch (err) {
      expected += 1;
      console.log('ERROR ' + JSON.stringify(String(err)));
    }
    number += 1;
    await call(options.afterwards, number, 64);
  }
}

// The library sends heartbeats from a ten-second statistics window; this is the same call, more often. It looks at the
// acknowledgement nowhere, so that is counted at the decoder.
async function quiet(ms) {
  for (const connection of client.connectionManager.connections.values()) {
    connection._decoder.on('heartbeat_ack', () => { heartbeats += 1; });
  }
  const end = Date.now() + ms;
  while (Date.now() < end) {
    for (const connection of client.connectionManager.connections.values()) connection.heartbeat();
    await pause(50);
  }
}

async function main() {
  console.log('READY 0');
  if (options.expect === 'error') {
    await refused();
  } else {
    const end = Date.now() + 1000 * Number(options.seconds || 0);
    await Promise.all(Array.from({ length: Number(options.workers || 1) }, () => worker(end)));
  }
  if (options.quiet_ms) await quiet(Number(options.quiet_ms));
  // Ended at the encoder, so that all that was written is sent before the end of the stream is.
  if (oneways) oneways.conn._encoder.end();
  const warned = lines.filter(line => !line.includes('The socket was closed'));
  console.log(JSON.stringify({
    peer: 'node-client', name: options.name, calls, notes, wrong, errors: errors.length, first_errors: errors.slice(0, 5), expected,
    heartbeats, log: warned.slice(0, 5),
  }));
  process.exit(errors.length || wrong ? 1 : 0);
}

main().catch(err => {
  console.log(JSON.stringify({ peer: 'node-client', name: options.name, errors: 1, first_errors: [ String(err.stack) ] }));
  process.exit(1);
});
