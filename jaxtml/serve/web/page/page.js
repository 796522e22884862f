// The page on which a person talks, types and shows pictures to the model, and hears and reads the model's answers.
//
// live.js keeps the session over lost connections, sound.js has the audio worklets, timeline.js draws.

import { Live, decode, encode } from "./live.js";
import { Timeline, drawHistory } from "./timeline.js";

const PICTURE_MS = 200; // between two pictures of the camera: the model takes one every 200 ms
const LOUD = 0.006; // root mean square above which the user is speaking
const ANSWER_S = 3; // what the model says later than this is no answer to the user's last sound
const SHOWN_LATENCIES = 12;
const OVER = new Error("the conversation is over"); // ends `startCamera`; the user is not told

// What a person may try: with every model of this project, and with the shipped model, which knows few words.
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
let live = null; // the conversation
let context = null; // the browser's audio context
let speaker = null; // worklet that plays the model's voice
let source = null; // what the model hears: { worklet, release } of a microphone or a recording
let muted = false;
let usesKeyboard = false; // a person without a mouse needs the focus moved when the focused button is disabled
let camera = null; // { stream, timer }
let lastLoud = null; // context time of the user's last sound
let latencies = []; // seconds
let models = [];
// For each voice, the list item to which words are still added, and the time of the last ones: { item, ms } or null.
let openLine = { you: null, model: null };

// Shows the state of the connection, or an error, to the user.
function showState(text, bad = false) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

// Asks the server for its model, and the user for a key if the server wants one.
async function loadModels() {
  const key = $("key").value;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch("v1/models", { headers });
  $("access").hidden = answer.status !== 401;
  if (!answer.ok) {
    return showState(answer.status === 401 ? "This server asks for a key" : "The server does not answer", true);
  }
  models = (await answer.json()).data;
  $("model").textContent = models[0].id;
  $("cards").replaceChildren(...[...(CARDS[models[0].id] ?? []), ...CARDS.all].map(cardItem));
  showState("Ready");
}

// Starts the audio and a new session.
async function openConversation() {
  context ??= new AudioContext({ sampleRate: 24000 });
  await context.resume();
  await context.audioWorklet.addModule("sound.js");
  speaker = new AudioWorkletNode(context, "speaker", { numberOfInputs: 0, outputChannelCount: [1] });
  speaker.connect(context.destination);
  speaker.port.onmessage = ({ data }) => data.audible && onAudible(data.audible);
  timeline.clear();
  $("words").replaceChildren();
  $("asked").replaceChildren();
  $("delegations").hidden = true;
  openLine = { you: null, model: null };
  lastLoud = null;
  showState("Connecting …");
  live = new Live(models[0].id, $("key").value);
  live.addEventListener("state", ({ detail }) => showState(detail.text, detail.bad));
  live.addEventListener("event", ({ detail }) => onEvent(detail));
  live.addEventListener("over", onOver);
  setControls("on");
}

async function startTalking() {
  let stream = null;
  setControls("opening");
  try {
    // The model was trained on voices of any level: gain control makes most of them clip.
    const wants = { echoCancellation: true, noiseSuppression: true, autoGainControl: false, channelCount: 1 };
    stream = await navigator.mediaDevices.getUserMedia({ audio: wants });
    await openConversation();
    connectSource(context.createMediaStreamSource(stream), () => stream.getTracks().forEach((track) => track.stop()));
  } catch (error) {
    stream?.getTracks().forEach((track) => track.stop());
    if (live) live.close();
    else setControls("idle");
    const refused = error.name === "NotAllowedError";
    showState(refused ? "The microphone was not allowed" : `No microphone: ${error.message}`, true);
  }
}

// Plays the demo recording to the model, and ends the conversation three seconds after it.
async function playRecording() {
  let node = null;
  setControls("opening");
  try {
    const data = await (await fetch("demo.flac")).arrayBuffer();
    context ??= new AudioContext({ sampleRate: 24000 });
    node = new AudioBufferSourceNode(context, { buffer: await context.decodeAudioData(data) });
    await openConversation();
  } catch (error) {
    setControls("idle");
    return showState(`No recording: ${error.message}`, true);
  }
  const ours = live;
  node.onended = () => setTimeout(() => live === ours && live.close(), 3000);
  connectSource(node, () => node.disconnect());
  node.connect(context.destination);
  node.start(context.currentTime + 1);
}

// Sends the sound of an audio node to the model. `release` frees the node when the conversation is over.
function connectSource(node, release) {
  const worklet = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0 });
  node.connect(worklet);
  source = { worklet, release };
  worklet.port.onmessage = ({ data: { packet, at } }) => {
    if (!live) return;
    const power = Math.sqrt(packet.reduce((sum, x) => sum + x * x, 0) / packet.length);
    if (timeline.began !== null) timeline.level("you", timeline.now - 20, timeline.now, muted ? 0 : power);
    if (muted) return;
    if (power > LOUD) lastLoud = at;
    live.send({ type: "session.input_audio.append", audio: encode(packet) });
  };
}

// Shows an event of the server.
function onEvent(event) {
  switch (event.type) {
    case "session.started":
      timeline.began = performance.now();
      $("camera").disabled = !event.session.sees;
      $("camera").title = event.session.sees ? "" : "This model does not see";
      break;
    case "session.resumed": // the user may have muted or unmuted while the connection was lost
      live.send({ type: `session.input_audio.${muted ? "mute" : "unmute"}` });
      break;
    case "session.output_audio.delta": {
      const samples = decode(event.delta);
      speaker.port.postMessage(samples);
      if (event.speaking) timeline.gate(event.start_ms, event.end_ms);
      for (let at = 0; at < samples.length; at += 480) {
        const part = samples.subarray(at, at + 480);
        const power = Math.sqrt(part.reduce((sum, x) => sum + x * x, 0) / part.length);
        const start = event.start_ms + at / 24;
        timeline.level("model", start, start + 20, power);
      }
      if (!event.speaking) openLine.model = null;
      break;
    }
    case "session.input_transcript.delta":
      addWords("you", event.start_ms, event.delta);
      break;
    case "session.output_transcript.delta":
      addWords("model", event.start_ms, event.delta);
      openLine.you = null;
      break;
    case "session.delegation.created":
      showDelegation(event.delegation);
      break;
    case "info":
      showState(event.message, true);
      break;
    case "error":
      if (live?.ready) showState(event.error.message, true);
  }
}

function cardItem([what, about]) {
  const item = document.createElement("li");
  const bold = document.createElement("b");
  bold.textContent = what;
  item.append(bold, `. ${about}`);
  return item;
}

// Adds words to the list of what was heard and said: to the open line of `who`, or to a new line.
function addWords(who, ms, text) {
  timeline.word(who, ms, text);
  const last = openLine[who];
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
  openLine[who] = { item, ms };
}

// Shows a delegation of the model, with a field for the user's answer.
function showDelegation({ id, task }) {
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
    input.readOnly = button.disabled = true; // a read-only field keeps the focus, a disabled one would not
  };
  item.append(form);
  $("asked").append(item);
}

// Shows the latency of an answer. `at`: context time at which the model's voice becomes audible.
function onAudible(at) {
  const heard = at + (context.outputLatency || 0);
  if (lastLoud === null || heard - lastLoud > ANSWER_S || heard < lastLoud) return;
  latencies = [...latencies, heard - lastLoud].slice(-SHOWN_LATENCIES);
  $("latency").textContent = `${latencies.at(-1).toFixed(2)} s`;
  drawHistory($("history"), latencies);
}

// Starts the camera, or stops it if it is on. The browser asks the user first. When the user answers, the conversation
// may be over already.
async function startCamera() {
  if (camera) return stopCamera();
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
    }, PICTURE_MS);
    camera = { stream, timer };
    $("camera").setAttribute("aria-pressed", "true");
  } catch (error) {
    stream?.getTracks().forEach((track) => track.stop());
    if ($("view").srcObject === stream) $("view").hidden = true;
    if (live === ours) showState(`No camera: ${error.message}`, true);
  } finally {
    if (live === ours) $("camera").disabled = false;
  }
}

function stopCamera() {
  if (!camera) return;
  clearInterval(camera.timer);
  camera.stream.getTracks().forEach((track) => track.stop());
  camera = null;
  $("view").hidden = true;
  $("camera").setAttribute("aria-pressed", "false");
}

function toggleMute() {
  muted = !muted;
  $("mute").setAttribute("aria-pressed", String(muted));
  $("mute").textContent = muted ? "Muted" : "Mute";
  live?.send({ type: muted ? "session.input_audio.mute" : "session.input_audio.unmute" });
}

// Releases everything when the conversation is over.
function onOver() {
  stopCamera();
  source?.release();
  source?.worklet.disconnect();
  speaker?.disconnect();
  source = speaker = live = null;
  if (muted) {
    muted = false;
    $("mute").setAttribute("aria-pressed", "false");
    $("mute").textContent = "Mute";
  }
  setControls("idle");
}

// Enables the controls of a state: "idle" (no conversation), "opening" (from the click until there is a session that
// can be ended) or "on" (a conversation).
function setControls(state) {
  if (state !== "on") usesKeyboard = document.activeElement.matches(":focus-visible");
  for (const id of ["talk", "play"]) $(id).disabled = state !== "idle";
  for (const id of ["mute", "stop", "text", "send"]) $(id).disabled = state !== "on";
  if (state !== "on") $("camera").disabled = true;
  const lost = document.activeElement.matches("body, :disabled");
  if (usesKeyboard && lost && state !== "opening") $(state === "on" ? "stop" : "talk").focus();
}

$("talk").onclick = startTalking;
$("play").onclick = playRecording;
$("mute").onclick = toggleMute;
$("camera").onclick = startCamera;
$("stop").onclick = () => live?.close();
$("typing").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || !live) return;
  live.send({ type: "session.input_text.append", content: text });
  addWords("you", timeline.now, text);
  openLine.you = null;
  $("text").value = "";
};
$("access").onsubmit = (event) => {
  event.preventDefault();
  loadModels();
};
addEventListener("keydown", (event) => {
  const id = event.altKey && { KeyT: "talk", KeyP: "play", KeyM: "mute", KeyS: "stop" }[event.code];
  if (id && !$(id).disabled) {
    event.preventDefault();
    $(id).click();
  }
});
loadModels();
