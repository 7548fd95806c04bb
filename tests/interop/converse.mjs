// Romeo and Juliet with Converse.js, each in a browser of their own, as people use it: they log in, chat, meet in a room.
// node converse.mjs CHROMIUM PAGE SERVICE FOLDER; SERVICE is wss://… (WebSocket) or https://… (BOSH).
// Exit status 0: all went as it should; the screens are in FOLDER then.

import assert from "node:assert/strict";
import puppeteer from "puppeteer-core";

const [executablePath, page, service, folder] = process.argv.slice(2);
const PATIENCE = 20_000; // milliseconds for one thing to happen
const ROOM = "kitchen@conference.example.org";

const browser = await puppeteer.launch({
  executablePath,
  headless: true,
  timeout: PATIENCE,
  // The server's own authority is not in the browser's store; no request leaves this machine.
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--ignore-certificate-errors",
    "--host-resolver-rules=MAP example.org 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
});

class Person {
  static async arrives(name) {
    const person = new Person();
    const context = await browser.createBrowserContext();
    person.name = name;
    person.tab = await context.newPage();
    person.tab.setDefaultTimeout(PATIENCE);
    person.said = [];
    person.tab.on("console", (message) => person.said.push(message.text()));
    person.tab.on("pageerror", (error) => person.said.push(String(error)));
    await person.tab.setViewport({ width: 1000, height: 700 });
    const words = new URLSearchParams({ jid: `${name}@example.org`, password: `${name}-secret`, service });
    await person.tab.goto(`${page}?${words}`);
    await person.waits("is logged in", () => window.online === true);
    return person;
  }

  // Wait until `sees`, which runs in the page, returns something.
  async waits(what, sees, ...given) {
    try {
      const handle = await this.tab.waitForFunction(sees, { timeout: PATIENCE }, ...given);
      return handle.jsonValue();
    } catch (error) {
      await this.tab.screenshot({ path: `${folder}/failed.png` });
      throw new Error(`${this.name}: never ${what}: ${error}\n${this.said.slice(-20).join("\n")}`);
    }
  }

  says(to, body) {
    return this.tab.evaluate(async (to, body) => {
      const chat = await window.api.chats.open(to, {}, true);
      await chat.sendMessage({ body });
    }, to, body);
  }

  reads(body) {
    return this.waits(`reads ${body}`, (body) =>
      [...document.querySelectorAll(".chat-msg__text")].some((text) => text.textContent.trim() === body), body);
  }

  enters(room) {
    return this.tab.evaluate((room, nick) => window.api.rooms.open(room, { nick }, true).then(() => true), room, this.name);
  }

  saysInRoom(body) {
    return this.tab.evaluate(async (room, body) => {
      const chat = await window.api.rooms.get(room);
      await chat.sendMessage({ body });
    }, ROOM, body);
  }
}

try {
  const [romeo, juliet] = [await Person.arrives("romeo"), await Person.arrives("juliet")];
  await romeo.says("juliet@example.org", "She speaks.");
  await juliet.says("romeo@example.org", "Ay me!");
  await juliet.reads("She speaks.");
  await romeo.reads("Ay me!");

  for (const person of [romeo, juliet]) {
    await person.enters(ROOM);
    await person.waits("is in the room", (room) => window.api.rooms.get(room).then((chat) => chat.session.get("connection_status") === 5), ROOM);
  }
  await romeo.saysInRoom("Who is here?");
  await juliet.reads("Who is here?");
  await juliet.saysInRoom("I am.");
  await romeo.reads("I am.");
  const used = await romeo.tab.evaluate(() => window.transport());
  assert.equal(used, service.startsWith("wss") ? "websocket" : "bosh");
  await romeo.tab.screenshot({ path: `${folder}/romeo.png` });
  await juliet.tab.screenshot({ path: `${folder}/juliet.png` });
  console.log("all well");
} catch (error) {
  console.error(error);
  process.exitCode = 1;
} finally {
  await browser.close();
}
