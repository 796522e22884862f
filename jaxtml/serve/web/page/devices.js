// The visitor's devices: the browser's sound, the microphone, the camera, and the demo recording. Used by page.js.
//
// No function here waits for `AudioContext.resume()`: without a sound output, or before the first click, some browsers
// never settle it.

import { MICROPHONE_GONE, MICROPHONE_OFF, MICROPHONE_SILENT } from "./messages.js";

const RATE = 24000; // Hz, of all sound that goes to the server and comes from it
const LOAD_MS = 5000; // the worklets must be loaded within this time
const STARTED_MS = 2000; // the browser must have started the sound within this time
const SILENT_PACKETS = 250; // 5 s: a microphone that has given only zeros since its start counts as silent then
const PICTURE_MS = 200; // between two pictures of the camera: the model takes one every 200 ms

// The browser's sound. Plays the model's voice.
export class Sound {
  // onAudible(at): the model is heard after a pause; `at` is the context's time. onChange(): `waits` may have changed.
  constructor(onAudible, onChange) {
    Object.assign(this, { onAudible, onChange, context: null, loaded: null, speaker: null, waits: false });
  }

  // Whether the browser gives this page audio worklets. Over plain http it does not.
  static get available() {
    return window.isSecureContext && Boolean(window.AudioContext && window.AudioWorkletNode);
  }

  // Opens the sound for a conversation. Rejects if this browser has no audio worklets, or they do not load in time.
  async open() {
    if (!Sound.available) throw new Error("this browser has no audio worklets");
    if (!this.context) {
      this.context = new AudioContext({ sampleRate: RATE });
      this.context.onstatechange = () => this.check();
    }
    this.wake();
    this.loaded ??= this.context.audioWorklet.addModule(new URL("sound.js", import.meta.url));
    try {
      await within(LOAD_MS, this.loaded);
    } catch (error) {
      this.loaded = null; // the next conversation tries again
      throw error;
    }
    if (this.speaker) return;
    this.speaker = new AudioWorkletNode(this.context, "speaker", { numberOfInputs: 0, outputChannelCount: [1] });
    this.speaker.connect(this.context.destination);
    this.speaker.port.onmessage = ({ data }) => data.audible && this.onAudible(data.audible);
    this.timer = setTimeout(() => this.check(), STARTED_MS);
  }

  // Asks the browser to start the sound, which it may refuse before the visitor's first click.
  wake() {
    if (this.context && this.context.state !== "running") this.context.resume().catch(() => {});
  }

  // Notes whether a conversation waits for the browser to start the sound.
  check() {
    this.waits = this.speaker !== null && this.context.state !== "running";
    this.onChange();
  }

  // Plays samples at 24 kHz.
  play(samples) {
    this.speaker?.port.postMessage(samples);
  }

  // Ends the sound of a conversation.
  close() {
    clearTimeout(this.timer);
    if (this.speaker) this.speaker.port.onmessage = null;
    this.speaker?.disconnect();
    this.speaker = null;
    this.waits = false;
  }
}

// What the model hears: an audio node whose sound is cut into packets of 20 ms.
class Source {
  // onPacket(packet, at): samples at 24 kHz, and the context's time of their end.
  constructor(context, node, onPacket) {
    this.node = node;
    this.worklet = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0 });
    this.worklet.port.onmessage = ({ data: { packet, at } }) => onPacket(packet, at);
    node.connect(this.worklet);
  }

  release() {
    this.worklet.port.onmessage = null;
    this.node.disconnect();
    this.worklet.disconnect();
  }
}

export class Microphone extends Source {
  // Whether the browser gives this page a microphone at all. Over plain http it does not.
  static get available() {
    return Boolean(navigator.mediaDevices?.getUserMedia && Sound.available);
  }

  // Asks for the microphone. Returns its stream; the browser asks the visitor first.
  static ask() {
    // The model was trained on voices of any level: gain control makes most of them clip.
    const wants = { echoCancellation: true, noiseSuppression: true, autoGainControl: false, channelCount: 1 };
    return navigator.mediaDevices.getUserMedia({ audio: wants });
  }

  // stream: from `ask`. onPacket: as for a source. onTrouble(message, gone): called with a message when something is
  // wrong with the microphone, and with null when it works again. gone: whether the microphone has ended.
  constructor(context, stream, onPacket, onTrouble) {
    let silent = 0; // packets of zeros since the start; -1: the microphone has given sound
    super(context, context.createMediaStreamSource(stream), (packet, at) => {
      if (silent >= 0 && packet.some((x) => x !== 0)) {
        if (silent >= SILENT_PACKETS) onTrouble(null, false);
        silent = -1;
      } else if (silent >= 0 && ++silent === SILENT_PACKETS) {
        onTrouble(MICROPHONE_SILENT, false);
      }
      onPacket(packet, at);
    });
    this.stream = stream;
    const [track] = stream.getAudioTracks();
    track.onended = () => onTrouble(MICROPHONE_GONE, true);
    track.onmute = () => onTrouble(MICROPHONE_OFF, false);
    track.onunmute = () => onTrouble(null, false);
    if (track.readyState === "ended") onTrouble(MICROPHONE_GONE, true);
    else if (track.muted) onTrouble(MICROPHONE_OFF, false);
  }

  release() {
    super.release();
    for (const track of this.stream.getTracks()) {
      track.onended = track.onmute = track.onunmute = null;
      track.stop();
    }
  }
}

// The demo recording, played to the model and to the visitor.
export class Recording extends Source {
  // Returns the recording as an audio buffer.
  static async load(context) {
    const answer = await fetch("demo.flac");
    if (!answer.ok) throw new Error(`the server answers ${answer.status} to demo.flac`);
    return context.decodeAudioData(await answer.arrayBuffer());
  }

  // Plays it one second from now. onEnded(): all of it was played.
  constructor(context, buffer, onPacket, onEnded) {
    const node = new AudioBufferSourceNode(context, { buffer });
    super(context, node, onPacket);
    node.onended = onEnded;
    node.connect(context.destination);
    node.start(context.currentTime + 1);
  }

  release() {
    this.node.onended = null;
    super.release();
  }
}

// The camera, shown in a video element.
export class Camera {
  // onPicture(jpeg as base64): several times a second. onEnded(): the camera was unplugged or taken away.
  constructor(stream, video, onPicture, onEnded) {
    Object.assign(this, { stream, video });
    const canvas = document.createElement("canvas");
    this.timer = setInterval(() => {
      canvas.width = video.videoWidth;
      canvas.height = video.videoHeight;
      canvas.getContext("2d").drawImage(video, 0, 0);
      onPicture(canvas.toDataURL("image/jpeg", 0.7).split(",")[1]);
    }, PICTURE_MS);
    stream.getVideoTracks()[0].onended = onEnded;
  }

  static ask() {
    return navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 } });
  }

  release() {
    clearInterval(this.timer);
    this.stream.getTracks().forEach((track) => track.stop());
    this.video.hidden = true;
  }
}

// Waits for a promise at most `ms`. Rejects if it takes longer.
function within(ms, promise) {
  const late = new Promise((_, reject) => setTimeout(() => reject(new Error("it took too long")), ms));
  return Promise.race([promise, late]);
}
