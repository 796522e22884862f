// A client of GPT-Live: one session over as many connections as it takes.

const AGAIN_MS = 4000; // between two tries to come back, at most
const KEPT = 500; // packets of sound that were sent and may have been lost on the way
const WAITING = 100; // that could not be sent
const SAID = 100; // other messages that may have been lost

export class Live extends EventTarget {
  // key: or "". Events: `event` (detail: what the server sent), `state` (detail: text, and whether it is bad).
  constructor(model, key) {
    super();
    this.model = model;
    this.key = key;
    this.number = 0;
    this.session = null;
    this.over = false;
    this.tries = 0;
    this.said = []; // what was typed or pressed last, by `event_id` 1, 2 and so on
    this.count = 0;
    this.sound = []; // the last packets, `written` of them sent; the server has had `before` bytes before them
    this.written = 0;
    this.before = 0;
    this.closing = false;
    this.connect();
  }

  connect() {
    if (this.over) return;
    const known = this.session ? `?session_id=${this.session.id}` : ""; // by which a router finds its server
    const address = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/live/sessions${known}`;
    const protocols = this.key ? ["realtime", `openai-insecure-api-key.${this.key}`] : ["realtime"];
    this.socket = new WebSocket(address, protocols);
    this.ready = false;
    this.socket.onopen = () => {
      if (this.session) {
        const { id, resume } = this.session;
        this.write({ type: "session.resume", session_id: id, resume_token: resume.token, after: this.number });
      } else {
        const format = { type: "audio/pcm", rate: 24000 };
        this.write({ type: "session.start", session: { model: this.model, audio: { format } } });
      }
    };
    this.socket.onmessage = ({ data }) => this.received(JSON.parse(data));
    this.socket.onclose = ({ code, reason }) => this.closed(code, reason);
  }

  write(message) {
    this.socket.send(JSON.stringify(message));
  }

  send(message) {
    if (message.type === "session.input_audio.append") return this.hear(message);
    if (message.type !== "session.input_image.append") { // a picture is what is seen now, and not later
      message.event_id = String(++this.count);
      if (this.said.push(message) > SAID) this.said.shift();
    }
    if (this.ready) this.write(message);
  }

  hear(message) {
    this.sound.push(message);
    if (this.ready) {
      this.write(message);
      if (++this.written > KEPT) {
        this.before += size(this.sound.shift());
        this.written--;
      }
    } else if (this.sound.length > this.written + WAITING) {
      this.sound.splice(this.written, 1);
    }
  }

  // The server has had so many bytes of sound, and what was said up to an `event_id`: what it has not comes again.
  goOn(taken, last) {
    let at = this.before;
    this.sound = this.sound.filter((message) => (at += size(message)) > taken);
    this.written = this.sound.length;
    this.before = taken;
    if (this.sound.length) this.write({ type: "session.input_audio.unmute" }); // nobody sends sound while muted
    this.sound.forEach((message) => this.write(message));
    this.said = this.said.filter((message) => Number(message.event_id) > last);
    this.said.forEach((message) => this.write(message));
  }

  // Whether pictures would only wait: sound comes first.
  get busy() {
    return !this.ready || this.socket.bufferedAmount > 0;
  }

  received(event) {
    if (event.sequence_number) this.number = event.sequence_number;
    if (event.type === "session.started") this.session = event.session;
    if (event.type === "session.started" || event.type === "session.resumed") {
      this.ready = true;
      this.tries = 0;
      this.goOn(event.input_audio_bytes ?? 0, Number(event.last_client_event_id ?? 0));
      if (this.closing) this.write({ type: "session.close" }); // the first one was lost
      this.tell("Connected");
    }
    if (event.type === "session.closed") this.over = true;
    if (event.type === "error" && !this.ready) {
      this.over = true;
      const again = event.error.retry_after_s ? ` Try again in ${event.error.retry_after_s} s.` : "";
      this.tell(`${event.error.message}.${again}`, true);
    }
    this.dispatchEvent(new CustomEvent("event", { detail: event }));
  }

  closed(code, reason) {
    this.ready = false;
    if (this.over) {
      if (this.session || this.closing) this.tell("The conversation is over");
    } else if (this.session && this.waits()) {
      this.tell("Connection lost, coming back …", true);
      this.again = setTimeout(() => this.connect(), Math.min(250 * 2 ** ++this.tries, AGAIN_MS));
      return;
    } else {
      this.tell(this.session ? "The connection is gone" : `No connection (${reason || code})`, true);
    }
    this.dispatchEvent(new Event("over"));
  }

  // Whether the server still has the session.
  waits() {
    if (!this.tries) this.lostAt = performance.now();
    return performance.now() < this.lostAt + 1000 * this.session.resume.grace_s;
  }

  close() {
    this.closing = true;
    if (this.ready) this.write({ type: "session.close" });
    else {
      this.over = true;
      clearTimeout(this.again);
      if (this.socket.readyState === WebSocket.CLOSED) this.closed();
      else this.socket.close(1000);
    }
  }

  tell(text, bad = false) {
    this.dispatchEvent(new CustomEvent("state", { detail: { text, bad } }));
  }
}

function size({ audio }) {
  return (audio.length / 4) * 3 - (audio.endsWith("=") ? 1 : 0) - (audio.endsWith("==") ? 1 : 0);
}

export function encoded(samples) {
  const data = new DataView(new ArrayBuffer(2 * samples.length));
  samples.forEach((sample, i) => data.setInt16(2 * i, Math.max(-1, Math.min(1, sample)) * 32767, true));
  let text = "";
  for (const byte of new Uint8Array(data.buffer)) text += String.fromCharCode(byte);
  return btoa(text);
}

export function decoded(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const data = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => data.getInt16(2 * i, true) / 32768);
}
