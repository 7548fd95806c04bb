// The same client logs in by SASL2 and Bind 2, then again by a token: node fast.mjs xmpp://127.0.0.1:5222
// NODE_EXTRA_CA_CERTS names the authority to trust. Exit status 0: all went as it should.

import assert from "node:assert/strict";
import { client, xml } from "@xmpp/client";
import WebSocket from "ws";

globalThis.WebSocket ??= WebSocket; // node has its own from version 22 on

const PATIENCE = 30_000; // milliseconds for everything
const userAgent = xml("user-agent", { id: "d4565fa7-4d72-4749-b3d3-740edbf87770" }, xml("software", {}, "xmpp.js"));
setTimeout(() => fail("no end"), PATIENCE).unref();

// The library sometimes waits for an answer that it has had already (it opens a stream, then listens): its
// TimeoutErrors mean nothing. What does not come is found out here.
function fail(why) {
  console.error(why);
  process.exit(1);
}

// Logs in with a password or, in its place, a token; returns what was sent to log in, and what came of it.
async function login(password, token) {
  const kept = { token, sent: [] };
  const xmpp = client({
    service: process.argv[2], domain: "example.org", resource: "js", username: "romeo", password, userAgent,
  });
  xmpp.reconnect.stop();
  xmpp.fast.fetchToken = async () => kept.token;
  xmpp.fast.saveToken = async (token) => { kept.token = token; };
  xmpp.fast.deleteToken = async () => { kept.token = undefined; };
  xmpp.on("error", (error) => error.name === "TimeoutError" || fail(String(error)));
  xmpp.on("send", (element) => kept.sent.push(element));
  xmpp.timeout = PATIENCE;
  await xmpp.start();
  await xmpp.iqCaller.get(xml("ping", { xmlns: "urn:xmpp:ping" }), "example.org");
  kept.jid = String(xmpp.jid);
  await xmpp.stop();
  return kept;
}

const NS = "urn:xmpp:sasl:2";
const first = await login("romeo-secret");
assert.equal(first.token.mechanism, "HT-SHA-256-NONE");
assert.ok(new Date(first.token.expiry) > new Date());
const second = await login("no password at all", first.token);
const [request, ...others] = second.sent.filter((element) => element.is("authenticate", NS));
assert.equal(request.attrs.mechanism, "HT-SHA-256-NONE");
assert.equal(others.length, 0);
assert.equal(second.jid, first.jid);
const third = await login("romeo-secret", { ...first.token, token: "stolen and spoiled" });
assert.equal(third.sent.filter((element) => element.is("authenticate", NS)).length, 2);
assert.notEqual(third.token.token, first.token.token);
console.log("all well");
process.exit(0);
