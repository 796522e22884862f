// The two audio worklets of the page, which run in the browser's audio thread. Loaded by page.js.
//
// "microphone" cuts what the microphone hears into packets of 20 ms at 24 kHz. "speaker" plays the model's voice in
// order, with a small reserve against packets that come late.

const RATE = 24000;
const PACKET = RATE / 50; // samples: 20 ms
const RESERVE_S = 0.12; // playback begins when this much sound waits, so packets may come this late
// After a stalled connection, a lot of sound comes at once. While more than this waits, the speaker skips silent parts.
const LATE_S = 0.5;
const SILENT = 0.003; // root mean square below which sound is silence
const AUDIBLE = 0.006; // root mean square above which the model is heard
const PAUSE_S = 0.3; // after this much silence, sound of the model counts as a new answer

// Resamples a stream from `from` to `to` Hz with a windowed sinc, for browsers whose audio context has another rate
// than 24 kHz.
class Resampler {
  constructor(from, to) {
    this.step = from / to;
    this.cut = Math.min(1, to / from);
    this.half = Math.ceil(16 / this.cut);
    this.before = new Float32Array(2 * this.half);
    this.at = this.half;
  }

  put(samples) {
    const all = new Float32Array(this.before.length + samples.length);
    all.set(this.before);
    all.set(samples, this.before.length);
    const out = [];
    for (; this.at + this.half < all.length; this.at += this.step) {
      const middle = Math.floor(this.at);
      let sum = 0;
      for (let i = middle - this.half + 1; i <= middle + this.half; i++) {
        const x = this.at - i;
        const window = 0.5 + 0.5 * Math.cos((Math.PI * x) / (this.half + 1));
        const angle = Math.PI * x * this.cut;
        sum += all[i] * window * this.cut * (Math.abs(angle) < 1e-9 ? 1 : Math.sin(angle) / angle);
      }
      out.push(sum);
    }
    const kept = Math.max(0, all.length - 2 * this.half);
    this.before = all.slice(kept);
    this.at -= kept;
    return Float32Array.from(out);
  }
}

function loudness(samples) {
  return Math.sqrt(samples.reduce((sum, x) => sum + x * x, 0) / samples.length);
}

// Posts { packet, at }: 20 ms of sound, and the context time of its end.
class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = sampleRate === RATE ? null : new Resampler(sampleRate, RATE);
    this.packet = new Float32Array(PACKET);
    this.filled = 0;
  }

  process([input]) {
    if (!input.length) return true;
    const samples = this.resampler ? this.resampler.put(input[0]) : input[0];
    for (const sample of samples) {
      this.packet[this.filled++] = sample;
      if (this.filled === PACKET) {
        this.port.postMessage({ packet: this.packet, at: currentTime }, [this.packet.buffer]);
        this.packet = new Float32Array(PACKET);
        this.filled = 0;
      }
    }
    return true;
  }
}

// Takes Float32Arrays at 24 kHz. Posts { audible }: the context time at which the model is heard after a pause.
class Speaker extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = sampleRate === RATE ? null : new Resampler(RATE, sampleRate);
    this.queue = [];
    this.offset = 0;
    this.waiting = 0;
    this.playing = false;
    this.quiet = Infinity; // seconds since the model was heard
    this.port.onmessage = ({ data }) => {
      const samples = this.resampler ? this.resampler.put(data) : data;
      this.queue.push(samples);
      this.waiting += samples.length;
      for (let i = 1; i < this.queue.length && this.waiting > LATE_S * sampleRate; ) {
        if (loudness(this.queue[i]) > SILENT) i++;
        else this.waiting -= this.queue.splice(i, 1)[0].length;
      }
    };
  }

  process(_, [output]) {
    const out = output[0];
    if (!this.playing && this.waiting >= RESERVE_S * sampleRate) this.playing = true;
    for (let i = 0; i < out.length && this.playing; i++) {
      if (!this.queue.length) {
        this.playing = false; // nothing came in time: pause until the reserve is full again
        break;
      }
      out[i] = this.queue[0][this.offset++];
      this.waiting--;
      if (this.offset === this.queue[0].length) {
        this.queue.shift();
        this.offset = 0;
      }
    }
    for (let c = 1; c < output.length; c++) output[c].set(out);
    if (loudness(out) > AUDIBLE) {
      if (this.quiet > PAUSE_S) this.port.postMessage({ audible: currentTime });
      this.quiet = 0;
    } else {
      this.quiet += out.length / sampleRate;
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
registerProcessor("speaker", Speaker);
