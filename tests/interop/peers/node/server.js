'use strict';

// sofa-rpc-node's RpcServer, answering with what it was asked. Serves until its standard input ends, then prints a summary.
// Arguments: port, service=NAME (as `package.Service:version`).

const { RpcServer } = require('sofa-rpc-node').server;
const { options, proto, logger } = require('./wire');

const lines = [];
const connections = new Set();
const distinct = new Set();
let answered = 0;
let notes = 0;
let failed = 0;

const server = new RpcServer({ logger: logger(lines), port: Number(options.port), proto });
server.on('error', err => { failed += 1; lines.push(String(err)); });
server.on('connection', connection => { connections.add(connection.remoteAddress); });
const [ interfaceName, version ] = options.service.split(':');
server.addService({ interfaceName, version }, {
  async echo(blob) {
    answered += 1;
    // An empty message arrives as no argument at all; a hessian argument is the buffer itself.
    if (blob === undefined) return {};
    return Buffer.isBuffer(blob) ? blob : { data: blob.data };
  },
  async note(blob) {
    notes += 1;
    // The number and the caller stand first; the whole of minutes of notes would fill the heap.
    const data = Buffer.from(Buffer.isBuffer(blob) ? blob : blob.data);
    distinct.add(data.length + ' ' + data.toString('latin1', 0, 40));
    return Buffer.isBuffer(blob) ? blob : {};
  },
});

server.start().then(() => { console.log('READY ' + options.port); });
process.stdin.resume();
process.stdin.on('end', async () => {
  // Nobody answers a note, so the last ones may still be on their way here when we are told to end:
  // look until none has come for a while. One that is lost is missed all the same.
  for (let look = 0, seen = -1; look < 12 && seen !== notes; look += 1) {
    seen = notes;
    await new Promise((resolve) => { setTimeout(resolve, 250); });
  }
  const summary = {
    peer: 'node-server', answered, notes, notes_distinct: distinct.size, wrong: failed, connections: connections.size, log: lines.slice(0, 5),
  };
  console.log(JSON.stringify(summary));
  await server.close();
  process.exit(failed ? 1 : 0);
});
