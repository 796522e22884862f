// The page on which a person talks, types and shows pictures to the model, and hears and reads the model's answers.
//
// live.js keeps the session over lost connections and reloads, devices.js opens sound, microphone and camera, words.js
// lists what was said, timeline.js draws, models.js and messages.js have the texts.

import { Camera, Microphone, Recording, Sound } from "./devices.js";
import { Live, decode, encode } from "./live.js";
import * as messages from "./messages.js";
import { aboutModel } from "./models.js";
import { Timeline, drawHistory } from "./timeline.js";
import { WordList, showDelegation } from "./words.js";

const LOUD = 0.006; // root mean square above which the user is speaking
const ANSWER_S = 3; // what the model says later than this is no answer to the user's last sound
const SHOWN_LATENCIES = 12;
const ASK_AGAIN_MS = 3000; // after this time, the page again asks a server that did not answer
// Name of the saved conversation in the session storage. It contains the path of the page, because another server may
// be under another path of the same origin.
const SAVED = `jaxtml conversation ${new URL(".", location).pathname}`;
const KEY_CODES = ["missing_api_key", "invalid_api_key", "expired_api_key", "insufficient_scope"];
const OVER = new Error("the conversation is over"); // ends `startCamera`; the user is not told

const $ = (id) => document.getElementById(id);
const timeline = new Timeline($("timeline"));
const words = new WordList($("words"), (who, ms, text) => timeline.word(who, ms, text));
const sound = new Sound(onAudible, refresh);
let model = null; // name of the served model; null: not known yet, so no conversation can begin
let about = aboutModel("");
let live = null; // the conversation
let connection = ""; // its state: "connecting", "connected" or "lost"
let asking = null; // message while the browser asks for the microphone or loads the recording, else null
let source = null; // what the model hears: a microphone or the recording
let camera = null;
let muted = false;
let notice = null; // { text, advice, bad } that is shown until something else happens
let trouble = null; // message about the microphone, shown as long as it is true
let silenced = false; // whether this conversation has words only, because the browser plays no sound
let usesKeyboard = false; // a person without a mouse needs the focus moved when the focused button goes away
let lastLoud = null; // context time of the user's last sound
let latencies = []; // seconds
let asksAgain = null; // timer of the next `loadModel`
let tasks = []; // delegations of the model that the user has not answered
let saved = takeSaved(); // the conversation that a reload has interrupted, or null
if (saved) $("key").value = saved.key;

// --- what the page says and offers

// Returns what to say now: { text, advice, bad }.
function currentMessage() {
  const problem = (message) => ({ ...message, bad: true });
  if (live) {
    if (live.closing) return messages.ENDING;
    if (connection === "lost") return problem(messages.LOST);
    if (notice) return notice;
    if (connection === "connecting") return { text: "Connecting …", advice: "" };
    if (asking) return asking;
    if (sound.waits) return problem(messages.SOUND_WAITS);
    if (trouble) return problem(trouble);
    if (silenced) return problem(messages.NO_SOUND);
    return { text: "Connected", advice: connectedAdvice() };
  }
  if (asking) return asking;
  if (notice) return notice;
  if (model === null) return { text: "Asking the server …", advice: "" };
  if (!Microphone.available) return problem(messages.noMicrophone());
  return { text: "Ready", advice: "Press Talk and allow the microphone, or type." };
}

function connectedAdvice() {
  if (!source) return Microphone.available ? "Press Talk to speak, or type." : "Type a sentence.";
  if (muted) return "You are muted: the model hears silence.";
  return source instanceof Recording ? "The recording plays to the model." : "Speak now, or type.";
}

// Returns the title of the cards.
function cardsTitle() {
  if (!about.sentences.length) return "Try";
  if (model === null) return "It understands sentences like these";
  if (source || asking) return "Say one of these, or click it";
  return Microphone.available ? "Press Talk and say one of these, or just click one" : "Click one of these, or type";
}

// Shows the message, and the controls that can be used now.
function refresh() {
  const { text, advice, bad } = currentMessage();
  if ($("state").textContent !== text) $("state").textContent = text; // a screen reader reads every change aloud
  $("state").classList.toggle("going", text.endsWith("…"));
  if ($("advice").textContent !== advice) $("advice").textContent = advice;
  $("status").classList.toggle("bad", bad === true);
  $("try").textContent = cardsTitle();

  const focused = document.activeElement;
  if (focused !== document.body) usesKeyboard = focused.matches(":focus-visible");
  const busy = live !== null || asking !== null;
  document.body.classList.toggle("talked", !$("conversation").hidden);
  offer("talk", model !== null && Microphone.available && !live?.closing, !source && !asking);
  offer("play", model !== null && Sound.available, !busy);
  offer("stop", busy, busy);
  offer("mute", live !== null, live !== null && source !== null);
  const sees = live?.session?.sees === true;
  offer("camera", camera !== null || (sees && !live.asksForCamera), sees);
  for (const id of ["text", "send"]) $(id).disabled = model === null;
  for (const card of document.querySelectorAll("#cards button")) card.disabled = model === null;
  const lost = document.activeElement.matches("body, :disabled") && focused.matches("#controls *");
  if (usesKeyboard && lost) $(busy ? "stop" : "talk").focus();
}

function offer(id, enabled, shown) {
  $(id).disabled = !enabled;
  $(id).hidden = !shown;
}

// Shows a message until something else happens.
function say(message, bad = true) {
  notice = { ...message, bad };
  refresh();
}

// --- the server and its model

// Asks the server for its model, and the user for a key if the server wants one. Then goes on with the conversation of
// a page that was reloaded.
async function loadModel() {
  clearTimeout(asksAgain);
  const key = $("key").value;
  let answer;
  try {
    answer = await fetch("v1/models", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
    if ([502, 503, 504].includes(answer.status)) throw new Error("a proxy has no server behind it");
  } catch {
    asksAgain = setTimeout(loadModel, ASK_AGAIN_MS);
    return say(messages.NO_SERVER);
  }
  if (!answer.ok) return sayRefused(await messages.errorOf(answer));
  $("access").hidden = true;
  notice = null;
  model = (await answer.json()).data[0].id;
  showModel();
  // The request above carries no origin, but the requests of a conversation do. So find out now whether the server
  // accepts the origin of this page.
  const preflight = await fetch("v1/live/sessions", { method: "OPTIONS" }).catch(() => null);
  const refused = preflight?.status === 403 ? await messages.errorOf(preflight) : {}; // a proxy may answer 403 too
  if (refused.code === "origin_not_allowed") {
    model = null;
    return sayRefused(refused);
  }
  refresh();
  if (saved) goOn(saved);
  saved = null;
}

function sayRefused(error) {
  $("access").hidden = !KEY_CODES.includes(error.code);
  say(messages.refusal(error));
  if (!$("access").hidden) $("key").focus();
}

// Shows why something failed. Waits for the server if it does not answer.
function sayFailure(reason) {
  say(reason);
  if (reason !== messages.NO_SERVER || live) return;
  model = null;
  loadModel();
}

// Shows what the model is and what it understands.
function showModel() {
  about = aboutModel(model);
  $("title").textContent = `Talk to ${model}, a speech model`;
  $("limits").textContent = about.limits;
  $("limits").hidden = !about.limits;
  $("try").hidden = false;
  const cards = about.sentences.length ? about.sentences.map(sentenceCard) : about.conduct.map(conductCard);
  $("cards").replaceChildren(...cards);
  $("tips").hidden = !about.tips;
  $("tips").textContent = about.tips;
}

function sentenceCard([text, about]) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const bold = document.createElement("b");
  const small = document.createElement("small");
  bold.textContent = `“${text}”`;
  small.textContent = about;
  button.append(bold, " ", small);
  button.onclick = () => type(text);
  item.append(button);
  return item;
}

function conductCard([what, about]) {
  const item = document.createElement("li");
  const bold = document.createElement("b");
  bold.textContent = `${what}.`;
  item.append(bold, ` ${about}`);
  return item;
}

// --- a conversation begins

// Begins a conversation, if there is none. session: of `Live.save`, to go on with a session.
function begin(session = null) {
  if (live) return;
  timeline.clear();
  words.clear();
  tasks = [];
  $("asked").replaceChildren();
  $("delegations").hidden = true;
  $("conversation").hidden = false;
  latencies = [];
  $("latency").textContent = "–";
  $("history").hidden = true;
  lastLoud = notice = trouble = null;
  connection = "connecting";
  live = new Live(model, $("key").value, session);
  const ours = live;
  ours.addEventListener("state", ({ detail }) => {
    [connection, notice] = [detail, null];
    if (detail === "lost") timeline.stop();
    refresh();
  });
  ours.addEventListener("event", ({ detail }) => onEvent(detail));
  ours.addEventListener("over", ({ detail }) => live === ours && onOver(detail));
}

// Opens the sound for a conversation that began with typed text or goes on after a reload. If the browser plays no
// sound, the conversation goes on in words alone.
async function openSound() {
  try {
    await sound.open();
    silenced = false;
  } catch {
    silenced = true;
  }
  if (!live) sound.close();
  refresh();
}

// Opens a source and gives it to the model.
// message: shown until the source is open. open: opens the devices and returns { start, cancel }. `start(live)` returns
// the source. `cancel()` releases the devices: it is called if the user has pressed End meanwhile.
async function openSource(message, open) {
  const ours = { ...message };
  [asking, notice] = [ours, null];
  refresh();
  try {
    const attach = await open();
    if (asking !== ours) return attach.cancel();
    begin();
    source = attach.start(live);
    silenced = false;
  } catch (error) {
    const reason = error.shown ?? (await messages.whyNotLoaded(error));
    if (asking === ours) {
      asking = null;
      if (!live) sound.close();
      sayFailure(reason);
    }
  } finally {
    if (asking === ours) asking = null;
    refresh();
  }
}

function startTalking() {
  return openSource(messages.ASKING, async () => {
    const stream = await Microphone.ask().catch((error) => {
      throw new messages.Trouble(messages.deviceTrouble(error, "microphone", "Talk"));
    });
    const cancel = () => stream.getTracks().forEach((track) => track.stop());
    try {
      await sound.open();
    } catch (error) {
      cancel();
      throw error;
    }
    const start = () => {
      trouble = null;
      return new Microphone(sound.context, stream, hear, onMicrophoneTrouble);
    };
    return { start, cancel };
  });
}

function onMicrophoneTrouble(message, gone) {
  trouble = message;
  if (gone) {
    // If the microphone has already ended, its constructor calls this function. `source` is set only after that.
    queueMicrotask(() => {
      source?.release();
      source = null;
      refresh();
    });
  }
  refresh();
}

// Plays the demo recording to the model, and ends the conversation three seconds after it.
function playRecording() {
  return openSource(messages.LOADING, async () => {
    await sound.open();
    const buffer = await Recording.load(sound.context);
    const start = (ours) => {
      const onEnded = () => setTimeout(() => live === ours && !ours.closing && ours.close(), 3000);
      return new Recording(sound.context, buffer, hear, onEnded);
    };
    return { start, cancel: () => live || sound.close() };
  });
}

// Sends typed text, in a new conversation if there is none. Returns whether the text could be sent.
function type(text) {
  if (model === null || !text || live?.closing) return false;
  if (!live) {
    begin();
    openSound();
  }
  notice = null;
  live.send({ type: "session.input_text.append", content: about.write(text) || text });
  words.addTyped(timeline.now, text);
  lastLoud = null; // what the model says next answers the text
  refresh();
  return true;
}

// Sends a packet of the user's sound. at: the context's time of its end.
function hear(packet, at) {
  if (!live) return;
  const power = loudness(packet);
  if (timeline.runs) timeline.level("you", timeline.now - 20, timeline.now, muted ? 0 : power);
  if (muted) return;
  if (power > LOUD) lastLoud = at;
  live.send({ type: "session.input_audio.append", audio: encode(packet) });
}

function loudness(samples) {
  return Math.sqrt(samples.reduce((sum, x) => sum + x * x, 0) / samples.length);
}

// --- a conversation goes on

// Handles an event of the server.
function onEvent(event) {
  switch (event.type) {
    case "session.started":
      timeline.run(0);
      refresh();
      break;
    case "session.resumed": // the user may have muted or unmuted while the connection was lost
      timeline.run(timeline.now);
      live.send({ type: `session.input_audio.${muted ? "mute" : "unmute"}` });
      refresh();
      break;
    case "session.output_audio.delta": {
      const samples = decode(event.delta);
      sound.play(samples);
      if (event.speaking) timeline.gate(event.start_ms, event.end_ms);
      for (let at = 0; at < samples.length; at += 480) {
        const start = event.start_ms + at / 24;
        timeline.level("model", start, start + 20, loudness(samples.subarray(at, at + 480)));
      }
      if (!event.speaking) words.endLine("model");
      break;
    }
    case "session.input_transcript.delta":
      words.add("you", event.start_ms, event.delta);
      break;
    case "session.output_transcript.delta":
      words.add("model", event.start_ms, event.delta);
      words.endLine("you");
      break;
    case "session.delegation.created":
      addTask(event.delegation);
      break;
    case "info":
      if (event.code === "going_away") say(messages.goingAway(event.time_left_ms));
      else say({ text: messages.sentence(event.message), advice: "" });
      break;
    case "error":
      if (live?.ready) say({ text: "The server did not take that", advice: messages.sentence(event.error.message) });
  }
}

// Shows a delegation of the model.
function addTask(task) {
  tasks.push(task);
  $("delegations").hidden = false;
  showDelegation($("asked"), task, (content) => {
    if (!live) return false;
    live.send({ type: "session.commentary.append", content, delegation_id: task.id });
    tasks = tasks.filter((other) => other !== task);
    return true;
  });
}

// Shows the latency of an answer. `at`: context time at which the model's voice becomes audible.
function onAudible(at) {
  const heard = at + (sound.context.outputLatency || 0);
  if (lastLoud === null || heard - lastLoud > ANSWER_S || heard < lastLoud) return;
  latencies = [...latencies, heard - lastLoud].slice(-SHOWN_LATENCIES);
  $("latency").textContent = `${latencies.at(-1).toFixed(2)} s`;
  $("history").hidden = false;
  drawHistory($("history"), latencies);
}

// Starts the camera, or stops it if it is on. The browser asks the user first. When the user answers, the conversation
// may be over already.
async function startCamera() {
  if (camera) return stopCamera();
  const ours = live;
  const video = $("view");
  let stream = null;
  ours.asksForCamera = true;
  refresh();
  try {
    stream = await Camera.ask();
    if (live !== ours) throw OVER;
    video.srcObject = stream;
    video.hidden = false;
    await video.play();
    if (live !== ours) throw OVER;
    const send = (image) => live.busy || live.send({ type: "session.input_image.append", image });
    camera = new Camera(stream, video, send, () => {
      stopCamera();
      say({ text: "The camera has stopped", advice: "It was unplugged, or the browser took it away." });
    });
    $("camera").setAttribute("aria-pressed", "true");
  } catch (error) {
    stream?.getTracks().forEach((track) => track.stop());
    if (video.srcObject === stream) video.hidden = true;
    if (live === ours) say(messages.deviceTrouble(error, "camera", "Camera"));
  } finally {
    ours.asksForCamera = false;
    refresh();
  }
}

function stopCamera() {
  camera?.release();
  camera = null;
  $("camera").setAttribute("aria-pressed", "false");
  refresh();
}

function toggleMute() {
  muted = !muted;
  $("mute").setAttribute("aria-pressed", String(muted));
  $("mute").textContent = muted ? "Muted" : "Mute";
  live?.send({ type: muted ? "session.input_audio.mute" : "session.input_audio.unmute" });
  refresh();
}

// --- a conversation ends, or the page goes away

function end() {
  asking = null;
  live?.close();
  if (!live) sound.close();
  refresh();
}

// Releases everything when the conversation is over. why: the detail of the event `over` of `Live`.
async function onOver(why) {
  live = asking = null;
  if (timeline.began === null && !why.gone) takeBackText();
  timeline.stop();
  stopCamera();
  source?.release();
  source = null;
  sound.close();
  if (muted) toggleMute();
  if (why.gone) {
    $("conversation").hidden = true;
    say({ text: "Ready", advice: "Your conversation from before has ended. Press Talk or type for a new one." }, false);
  } else if (why.refused) {
    sayRefused(why.refused);
  } else if (why.lost) {
    say(messages.notResumed(why.lost));
  } else if (why.unreachable) {
    say({ text: "No connection", advice: "Looking for the reason …" });
    const reason = await messages.whyNotConnected($("key").value);
    if (!live && !asking) sayFailure(reason);
  } else {
    say(messages.ended(why.reason), why.reason !== "close_requested");
  }
}

// Puts the last typed text, which reached no conversation, back into its field.
function takeBackText() {
  $("text").value ||= words.lines.findLast((line) => line.typed)?.text ?? "";
  $("conversation").hidden = true;
}

// Lets go of the conversation when the page goes away, and keeps what a reload needs to go on with it: in the session
// storage, which outlives a reload but not the tab.
function leavePage() {
  const session = live?.save();
  if (!session) return;
  const record = { session, at: Date.now(), key: $("key").value, ms: timeline.now, lines: words.lines, muted, tasks };
  try {
    sessionStorage.setItem(SAVED, JSON.stringify(record));
    live.leave();
  } catch { // The visitor forbids storage, so a reload begins anew. The browser's own close code ends the session.
  }
}

// Returns the conversation of this tab that a reload has interrupted, if the server may still have it, else null. It
// can be taken once, so that a copy of the tab does not take it over.
function takeSaved() {
  try {
    const saved = JSON.parse(sessionStorage.getItem(SAVED));
    sessionStorage.removeItem(SAVED);
    return saved && Date.now() < saved.at + 1000 * saved.session.session.resume.grace_s ? saved : null;
  } catch {
    return null;
  }
}

// Goes on with a conversation that a reload has interrupted. The microphone waits for the next click on Talk, because
// browsers give sound only after a click.
function goOn({ session, muted: wasMuted, lines, tasks: open, ms }) {
  begin(session);
  if (wasMuted) toggleMute();
  words.restore(lines);
  open.forEach(addTask);
  timeline.run(ms);
  timeline.stop();
  refresh();
}

$("talk").onclick = startTalking;
$("play").onclick = playRecording;
$("mute").onclick = toggleMute;
$("camera").onclick = startCamera;
$("stop").onclick = end;
$("typing").onsubmit = (event) => {
  event.preventDefault();
  // While a conversation ends, the text cannot be sent. It then stays in the field, for the next conversation.
  if (type($("text").value.trim())) $("text").value = "";
};
$("access").onsubmit = (event) => {
  event.preventDefault();
  loadModel();
};
addEventListener("keydown", (event) => {
  const id = event.altKey && { KeyT: "talk", KeyP: "play", KeyM: "mute", KeyS: "stop" }[event.code];
  if (id && !$(id).disabled) {
    event.preventDefault();
    $(id).click();
  }
});
for (const gesture of ["pointerup", "keydown"]) {
  addEventListener(gesture, () => (live && !sound.speaker && !silenced ? openSound() : sound.wake()));
}
// The page leaves at `beforeunload`, because Firefox sends no close code of ours at `pagehide`. Some browsers of phones
// have no `beforeunload`. There the page leaves at `pagehide`. If the visitor stays after all, `Live` connects again.
for (const leaving of ["beforeunload", "pagehide"]) addEventListener(leaving, leavePage);
// `persisted`: the browser has kept this page in memory while another page was shown. The conversation is then still in
// `live`, so the page drops the saved copy.
addEventListener("pageshow", ({ persisted }) => persisted && takeSaved());
$("unloaded").remove();
loadModel();
