// The page: a microphone, a camera and a line of text on one side of a session, and what comes of it.

import { Live, decoded, encoded } from "./live.js";
import { Timeline, drawHistory } from "./timeline.js";

const FRAME_MS = 200; // between two pictures of the camera
const LOUD = 0.006; // root mean square above which someone is heard
const ANSWER_S = 3; // after which it was no answer
const SHOWN = 12; // latencies
const OVER = new Error("the conversation is over"); // which nobody needs to be told

// What any model of the family does, and what the shipped one was trained to answer: it knows few words.
const CARDS = {
  all: [
    ["Talk while it talks", "It hears you, and stops when you mean it to."],
    ["Stop in the middle of a sentence", "It waits, and does not take the turn from you."],
  ],
  tiny: [
    ["Say “what is three plus four”", "It says the sum."],
    ["Say “repeat after me red green monday”", "It says the words."],
    ["Say “is july a month”", "It says yes or no."],
    ["Say “the code is three nine one”", "It says the number."],
  ],
};

const $ = (id) => document.getElementById(id);
const timeline = new Timeline($("timeline"));
let live = null;
let context = null;
let mouth = null;
let source = null; // what is heard: a microphone or a recording
let muted = false;
let byKeys = false; // whoever has only keys needs a place to go on from when a button goes
let camera = null;
let lastLoud = null; // context time of the user's last sound
let latencies = [];
let models = [];
let line = { you: null, model: null }; // list items that words are still added to

function tell(text, bad = false) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

async function look() {
  const key = $("key").value;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch("v1/models", { headers });
  $("access").hidden = answer.status !== 401;
  if (!answer.ok) return tell(answer.status === 401 ? "This server asks for a key" : "The server does not answer", true);
  models = (await answer.json()).data;
  $("model").textContent = models[0].id;
  $("cards").replaceChildren(...[...(CARDS[models[0].id] ?? []), ...CARDS.all].map(card));
  tell("Ready");
}

async function open() {
  context ??= new AudioContext({ sampleRate: 24000 });
  await context.resume();
  await context.audioWorklet.addModule("sound.js");
  mouth = new AudioWorkletNode(context, "mouth", { numberOfInputs: 0, outputChannelCount: [1] });
  mouth.connect(context.destination);
  mouth.port.onmessage = ({ data }) => data.audible && answered(data.audible);
  timeline.clear();
  $("words").replaceChildren();
  $("asked").replaceChildren();
  $("delegations").hidden = true;
  line = { you: null, model: null };
  lastLoud = null;
  tell("Connecting …");
  live = new Live(models[0].id, $("key").value);
  live.addEventListener("state", ({ detail }) => tell(detail.text, detail.bad));
  live.addEventListener("event", ({ detail }) => happened(detail));
  live.addEventListener("over", finish);
  controls("on");
}

async function talk() {
  let stream = null;
  controls("opening");
  try {
    // The model was trained on voices of any level: gain control makes most of them clip.
    const wants = { echoCancellation: true, noiseSuppression: true, autoGainControl: false, channelCount: 1 };
    stream = await navigator.mediaDevices.getUserMedia({ audio: wants });
    await open();
    hear(context.createMediaStreamSource(stream), () => stream.getTracks().forEach((track) => track.stop()));
  } catch (error) {
    stream?.getTracks().forEach((track) => track.stop());
    if (live) live.close();
    else controls("idle");
    tell(error.name === "NotAllowedError" ? "The microphone was not allowed" : `No microphone: ${error.message}`, true);
  }
}

async function play() {
  let node = null;
  controls("opening");
  try {
    const data = await (await fetch("demo.flac")).arrayBuffer();
    context ??= new AudioContext({ sampleRate: 24000 });
    node = new AudioBufferSourceNode(context, { buffer: await context.decodeAudioData(data) });
    await open();
  } catch (error) {
    controls("idle");
    return tell(`No recording: ${error.message}`, true);
  }
  const ours = live;
  node.onended = () => setTimeout(() => live === ours && live.close(), 3000);
  hear(node, () => node.disconnect());
  node.connect(context.destination);
  node.start(context.currentTime + 1);
}

function hear(node, release) {
  const ears = new AudioWorkletNode(context, "ears", { numberOfOutputs: 0 });
  node.connect(ears);
  source = { ears, release };
  ears.port.onmessage = ({ data: { packet, at } }) => {
    if (!live) return;
    const power = Math.sqrt(packet.reduce((sum, x) => sum + x * x, 0) / packet.length);
    if (timeline.began !== null) timeline.level("you", timeline.now - 20, timeline.now, muted ? 0 : power);
    if (muted) return;
    if (power > LOUD) lastLoud = at;
    live.send({ type: "session.input_audio.append", audio: encoded(packet) });
  };
}

function happened(event) {
  switch (event.type) {
    case "session.started":
      timeline.began = performance.now();
      $("camera").disabled = !event.session.sees;
      $("camera").title = event.session.sees ? "" : "This model does not see";
      break;
    case "session.resumed": // what was pressed while the connection was about to be lost
      live.send({ type: `session.input_audio.${muted ? "mute" : "unmute"}` });
      break;
    case "session.output_audio.delta": {
      const samples = decoded(event.delta);
      mouth.port.postMessage(samples);
      if (event.speaking) timeline.gate(event.start_ms, event.end_ms);
      for (let at = 0; at < samples.length; at += 480) {
        const part = samples.subarray(at, at + 480);
        const power = Math.sqrt(part.reduce((sum, x) => sum + x * x, 0) / part.length);
        const start = event.start_ms + at / 24;
        timeline.level("model", start, start + 20, power);
      }
      if (!event.speaking) line.model = null;
      break;
    }
    case "session.input_transcript.delta":
      say("you", event.start_ms, event.delta);
      break;
    case "session.output_transcript.delta":
      say("model", event.start_ms, event.delta);
      line.you = null;
      break;
    case "session.delegation.created":
      delegated(event.delegation);
      break;
    case "info":
      tell(event.message, true);
      break;
    case "error":
      if (live?.ready) tell(event.error.message, true);
  }
}

function card([what, about]) {
  const item = document.createElement("li");
  const bold = document.createElement("b");
  bold.textContent = what;
  item.append(bold, `. ${about}`);
  return item;
}

function say(who, ms, text) {
  timeline.word(who, ms, text);
  const last = line[who];
  if (last && ms - last.ms < 2500) {
    last.item.lastChild.textContent += text;
    last.ms = ms;
    return;
  }
  const item = document.createElement("li");
  item.className = who;
  const time = document.createElement("time");
  time.textContent = `${(ms / 1000).toFixed(1)} s`;
  const name = document.createElement("b");
  name.textContent = who === "you" ? "You" : "Model";
  item.append(time, name, document.createTextNode(text));
  $("words").append(item);
  $("words").scrollTop = $("words").scrollHeight;
  line[who] = { item, ms };
}

function delegated({ id, task }) {
  $("delegations").hidden = false;
  const item = document.createElement("li");
  const form = document.createElement("form");
  const label = document.createElement("label");
  label.textContent = task || "(no words)";
  label.htmlFor = id;
  const input = document.createElement("input");
  input.id = id;
  input.placeholder = "your answer";
  const button = document.createElement("button");
  button.textContent = "Answer";
  form.append(label, input, button);
  form.onsubmit = (event) => {
    event.preventDefault();
    if (!input.value || !live) return;
    live.send({ type: "session.commentary.append", content: input.value, delegation_id: id });
    input.readOnly = button.disabled = true; // the focus stays
  };
  item.append(form);
  $("asked").append(item);
}

function answered(at) {
  const heard = at + (context.outputLatency || 0);
  if (lastLoud === null || heard - lastLoud > ANSWER_S || heard < lastLoud) return;
  latencies = [...latencies, heard - lastLoud].slice(-SHOWN);
  $("latency").textContent = `${latencies.at(-1).toFixed(2)} s`;
  drawHistory($("history"), latencies);
}

async function film() {
  if (camera) return unfilm();
  const ours = live;
  let stream = null;
  $("camera").disabled = true;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 } });
    if (live !== ours) throw OVER;
    $("view").srcObject = stream;
    $("view").hidden = false;
    await $("view").play();
    if (live !== ours) throw OVER;
    const canvas = document.createElement("canvas");
    const timer = setInterval(() => {
      if (live.busy) return;
      canvas.width = $("view").videoWidth;
      canvas.height = $("view").videoHeight;
      canvas.getContext("2d").drawImage($("view"), 0, 0);
      const image = canvas.toDataURL("image/jpeg", 0.7).split(",")[1];
      live.send({ type: "session.input_image.append", image });
    }, FRAME_MS);
    camera = { stream, timer };
    $("camera").setAttribute("aria-pressed", "true");
  } catch (error) {
    stream?.getTracks().forEach((track) => track.stop());
    if ($("view").srcObject === stream) $("view").hidden = true;
    if (live === ours) tell(`No camera: ${error.message}`, true);
  } finally {
    if (live === ours) $("camera").disabled = false;
  }
}

function unfilm() {
  if (!camera) return;
  clearInterval(camera.timer);
  camera.stream.getTracks().forEach((track) => track.stop());
  camera = null;
  $("view").hidden = true;
  $("camera").setAttribute("aria-pressed", "false");
}

function mute() {
  muted = !muted;
  $("mute").setAttribute("aria-pressed", String(muted));
  $("mute").textContent = muted ? "Muted" : "Mute";
  live?.send({ type: muted ? "session.input_audio.mute" : "session.input_audio.unmute" });
}

function finish() {
  unfilm();
  source?.release();
  source?.ears.disconnect();
  mouth?.disconnect();
  source = mouth = live = null;
  if (muted) {
    muted = false;
    $("mute").setAttribute("aria-pressed", "false");
    $("mute").textContent = "Mute";
  }
  controls("idle");
}

// "idle"; "opening", from a click until there is a session that can be ended; "on".
function controls(state) {
  if (state !== "on") byKeys = document.activeElement.matches(":focus-visible");
  for (const id of ["talk", "play"]) $(id).disabled = state !== "idle";
  for (const id of ["mute", "stop", "text", "send"]) $(id).disabled = state !== "on";
  if (state !== "on") $("camera").disabled = true;
  const lost = document.activeElement.matches("body, :disabled");
  if (byKeys && lost && state !== "opening") $(state === "on" ? "stop" : "talk").focus();
}

$("talk").onclick = talk;
$("play").onclick = play;
$("mute").onclick = mute;
$("camera").onclick = film;
$("stop").onclick = () => live?.close();
$("typing").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || !live) return;
  live.send({ type: "session.input_text.append", content: text });
  say("you", timeline.now, text);
  line.you = null;
  $("text").value = "";
};
$("access").onsubmit = (event) => {
  event.preventDefault();
  look();
};
addEventListener("keydown", (event) => {
  const id = event.altKey && { KeyT: "talk", KeyP: "play", KeyM: "mute", KeyS: "stop" }[event.code];
  if (id && !$(id).disabled) {
    event.preventDefault();
    $(id).click();
  }
});
look();
