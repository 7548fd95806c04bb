// @xmpp/client comes back after its connection broke, several times, and misses nothing: node resume.mjs xmpp://127.0.0.1:5222
// NODE_EXTRA_CA_CERTS names the authority to trust. Exit status 0: all went as it should.

import assert from "node:assert/strict";
import { once } from "node:events";
import { client, xml } from "@xmpp/client";

const service = process.argv[2];
const PATIENCE = 15_000; // milliseconds for one thing to happen
const CUTS = 3;

function person(name, resource) {
  const xmpp = client({ service, domain: "example.org", resource, username: name, password: `${name}-secret` });
  xmpp.timeout = PATIENCE;
  xmpp.reconnect.delay = 50;
  xmpp.heard = [];
  xmpp.on("error", () => {}); // a connection that breaks is what this is about
  xmpp.on("stanza", (stanza) => stanza.getChild("body") && xmpp.heard.push(stanza.getChildText("body")));
  return xmpp;
}

const soon = (promise, what) =>
  Promise.race([promise, new Promise((_, reject) => setTimeout(() => reject(new Error(`no ${what}`)), PATIENCE).unref())]);

async function hears(xmpp, body) {
  while (!xmpp.heard.includes(body)) await soon(once(xmpp, "stanza"), body);
}

const says = (xmpp, to, body) => xmpp.send(xml("message", { to, type: "chat" }, xml("body", {}, body)));
const isThrough = (xmpp) => xmpp.iqCaller.get(xml("query", { xmlns: "jabber:iq:roster" }));

const romeo = person("romeo", "orchard");
const juliet = person("juliet", "balcony");
await romeo.start();
await juliet.start();
await romeo.send(xml("presence"));
await juliet.send(xml("presence"));
const address = String(juliet.jid);

for (let number = 0; number < CUTS; number++) {
  await says(romeo, address, `${number} before`);
  await hears(juliet, `${number} before`);
  const resumed = once(juliet.streamManagement, "resumed");
  const broken = once(juliet, "disconnect");
  (juliet.socket.socket ?? juliet.socket).destroy();
  await soon(broken, "end of the connection");
  await says(romeo, address, `${number} during`);
  await isThrough(romeo);
  await soon(resumed, "resumption");
  await says(romeo, address, `${number} after`);
  await hears(juliet, `${number} during`);
  await hears(juliet, `${number} after`);
  await says(juliet, String(romeo.jid), `${number} back`);
  await hears(romeo, `${number} back`);
  assert.equal(String(juliet.jid), address);
}

// The library doesn't count answers to its own requests (XEP-0198 §4), so that some may come more than once; in order.
const first = juliet.heard.filter((body, at) => juliet.heard.indexOf(body) === at);
const all = [...Array(CUTS).keys()].flatMap((number) => ["before", "during", "after"].map((when) => `${number} ${when}`));
assert.deepEqual(first, all);
await juliet.stop();
await romeo.stop();
console.log("all well");
process.exit(0);
