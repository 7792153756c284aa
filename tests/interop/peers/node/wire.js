'use strict';

// What all peers agree on: arguments, payloads, the one-field protobuf message and its service.

const protobuf = require('protobufjs');
const bolt = require('sofa-bolt-node');

exports.proto = protobuf.parse(`
  syntax = "proto3";
  package interop;
  message Blob { bytes data = 1; }
  service Python { rpc echo(Blob) returns (Blob); rpc note(Blob) returns (Blob); }
  service Node { rpc echo(Blob) returns (Blob); rpc note(Blob) returns (Blob); }
  service Java { rpc echo(Blob) returns (Blob); rpc note(Blob) returns (Blob); }
  service JavaTwo { rpc echo(Blob) returns (Blob); rpc note(Blob) returns (Blob); }
  service Mosn { rpc echo(Blob) returns (Blob); rpc note(Blob) returns (Blob); }
  service Nobody { rpc echo(Blob) returns (Blob); rpc note(Blob) returns (Blob); }
`, { keepCase: true }).root;

exports.options = Object.fromEntries(process.argv.slice(2).map(argument => {
  const at = argument.indexOf('=');
  return [ argument.slice(0, at), argument.slice(at + 1) ];
}));

// Bytes that no other call of any client has (from a dozen bytes on): the number and the caller, repeated.
exports.payload = (caller, number, size) => {
  const data = Buffer.alloc(size);
  if (size) data.fill(`${number}#${caller}#`);
  return data;
};

// The library's own codec; only the properties that its encoder offers for the frame version are set.
exports.protocol = (wire, crc) => Object.assign({}, bolt, {
  encoder(options) {
    const encoder = bolt.encoder(options);
    if (wire === '2') {
      encoder.protocolType = 'bolt2';
      encoder.boltVersion = crc ? 2 : 1;
      encoder.crcEnable = crc;
    }
    return encoder;
  },
});

// The libraries log a warning for each thing out of the ordinary: they belong to the verdict.
exports.logger = lines => {
  const keep = (...args) => { if (lines.length < 50) lines.push(require('util').format(...args).slice(0, 300)); };
  return { info() {}, debug() {}, warn: keep, error: keep };
};
