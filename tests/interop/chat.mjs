// Two people with @xmpp/client, over TLS with verification: node chat.mjs xmpp://127.0.0.1:5222
// NODE_EXTRA_CA_CERTS names the authority to trust. Exit status 0: all went as it should.

import assert from "node:assert/strict";
import { client, xml } from "@xmpp/client";
import WebSocket from "ws";

globalThis.WebSocket ??= WebSocket; // node has its own from version 22 on

const service = process.argv[2];
const PATIENCE = 15_000; // milliseconds for one thing to happen

class Person {
  constructor(name, resource) {
    this.waiting = [];
    this.unread = [];
    this.xmpp = client({ service, domain: "example.org", resource, username: name, password: `${name}-secret` });
    this.xmpp.timeout = PATIENCE;
    this.xmpp.reconnect.stop();
    this.xmpp.on("error", (error) => error.name === "TimeoutError" || fail(`${name}: ${error}`));
    this.xmpp.on("stanza", (stanza) => {
      const at = this.waiting.findIndex(({ wanted }) => wanted(stanza));
      if (at < 0) this.unread.push(stanza);
      else this.waiting.splice(at, 1)[0].resolve(stanza);
    });
  }

  async comesOnline() {
    await this.xmpp.start();
    await this.xmpp.iqCaller.get(xml("query", { xmlns: "jabber:iq:roster" }));
    await this.xmpp.send(xml("presence"));
  }

  // The next stanza that is wanted, also one that came before anybody asked.
  gets(what, wanted) {
    const at = this.unread.findIndex(wanted);
    if (at >= 0) return Promise.resolve(this.unread.splice(at, 1)[0]);
    return new Promise((resolve) => {
      const timer = setTimeout(() => fail(`${this.xmpp.jid}: no ${what}`), PATIENCE);
      this.waiting.push({ wanted, resolve: (stanza) => (clearTimeout(timer), resolve(stanza)) });
    });
  }

  sees(type, from) {
    return this.gets(`presence ${type} from ${from}`, (stanza) =>
      stanza.is("presence") && (stanza.attrs.type ?? "available") === type && stanza.attrs.from.split("/")[0] === from);
  }

  // The library doesn't count answers to its own requests (XEP-0198 §4), so what it heard last comes once more.
  hears(body) {
    return this.gets(`message ${body}`, (stanza) => stanza.is("message") && stanza.getChildText("body") === body);
  }

  says(to, body) {
    return this.xmpp.send(xml("message", { to, type: "chat" }, xml("body", {}, body)));
  }

  presence(type, to) {
    return this.xmpp.send(xml("presence", { type, to }));
  }
}

// The library sometimes waits for an answer that it has had already (it opens a stream, then listens): its
// TimeoutErrors mean nothing. What does not come is found out here.
function fail(why) {
  console.error(why);
  process.exit(1);
}

const [ROMEO, JULIET] = ["romeo@example.org", "juliet@example.org"];
const romeo = new Person("romeo", "orchard");
let juliet = new Person("juliet", "balcony");
await romeo.comesOnline();
await juliet.comesOnline();

await romeo.presence("subscribe", JULIET);
await juliet.sees("subscribe", ROMEO);
await juliet.presence("subscribed", ROMEO);
await juliet.presence("subscribe", ROMEO);
await romeo.sees("subscribed", JULIET);
await romeo.sees("available", JULIET);
await romeo.sees("subscribe", JULIET);
await romeo.presence("subscribed", JULIET);
await juliet.sees("subscribed", ROMEO);
await juliet.sees("available", ROMEO);

await romeo.says(JULIET, "She speaks.");
const message = await juliet.hears("She speaks.");
assert.equal(message.attrs.from, String(romeo.xmpp.jid)); // chosen by Bind 2, for the tag "orchard"
assert.match(message.attrs.from, /^romeo@example\.org\/orchard\/./);
await juliet.says(message.attrs.from, "Ay me!");
await romeo.hears("Ay me!");

await juliet.xmpp.stop();
await romeo.sees("unavailable", JULIET);
await romeo.says(JULIET, "Wilt thou leave me");
await romeo.says(JULIET, "so unsatisfied?");
await romeo.xmpp.iqCaller.get(xml("query", { xmlns: "jabber:iq:roster" })); // the server is through with what came before

juliet = new Person("juliet", "chamber");
await juliet.comesOnline();
for (const body of ["Wilt thou leave me", "so unsatisfied?"]) {
  const missed = await juliet.hears(body);
  assert.match(missed.getChild("delay", "urn:xmpp:delay").attrs.stamp, /^\d{4}-\d\d-\d\dT.*Z$/);
}
await romeo.sees("available", JULIET);
await juliet.xmpp.stop();
await romeo.xmpp.stop();
console.log("all well");
process.exit(0);
