// A client of the GPT-Live protocol: one session, over as many connections as it takes. Used by page.js.
//
// When a connection is lost, the client connects again and resumes the session. The server says how much of the
// client's sound it has received, and the number of the last other message that it has received. The client then sends
// everything after that again.

const RECONNECT_MS = 4000; // the longest time between two attempts to reconnect
const KEPT_PACKETS = 500; // packets of sound that were sent and may have been lost on the way
const QUEUED_PACKETS = 100; // packets of sound that wait for a connection
const KEPT_MESSAGES = 100; // other messages that may have been lost on the way

export class Live extends EventTarget {
  // model: name of the model. key: key of the server, or "".
  // Dispatches `event` (detail: an event of the server), `state` (detail: a text for the user, and whether the text is
  // about a problem) and `over` (the conversation is over).
  constructor(model, key) {
    super();
    this.model = model;
    this.key = key;
    this.lastNumber = 0; // `sequence_number` of the last event that was received
    this.session = null; // as in `session.started`
    this.ready = false; // whether the connection carries the session
    this.over = false; // whether the session has ended
    this.closing = false; // whether the user has ended the conversation
    this.attempts = 0; // attempts to reconnect since the connection was lost
    this.messages = []; // the last messages without sound and pictures; their `event_id` is their number
    this.messageCount = 0;
    this.packets = []; // the last messages with sound, in order
    this.sentPackets = 0; // how many of `packets` were sent, from the first on
    this.droppedBytes = 0; // bytes of sound in the packets that are no longer in `packets`
    this.connect();
  }

  connect() {
    if (this.over) return;
    // A router in front of several servers finds the session's server by this parameter.
    const query = this.session ? `?session_id=${this.session.id}` : "";
    const address = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/live/sessions${query}`;
    // A browser cannot set headers of a WebSocket, so the key is sent as a subprotocol.
    const protocols = this.key ? ["realtime", `openai-insecure-api-key.${this.key}`] : ["realtime"];
    this.socket = new WebSocket(address, protocols);
    this.ready = false;
    this.socket.onopen = () => {
      if (this.session) {
        const { id, resume } = this.session;
        this.write({ type: "session.resume", session_id: id, resume_token: resume.token, after: this.lastNumber });
      } else {
        const format = { type: "audio/pcm", rate: 24000 };
        this.write({ type: "session.start", session: { model: this.model, audio: { format } } });
      }
    };
    this.socket.onmessage = ({ data }) => this.onEvent(JSON.parse(data));
    this.socket.onclose = ({ code, reason }) => this.onClose(code, reason);
  }

  write(message) {
    this.socket.send(JSON.stringify(message));
  }

  // Sends a message now or, if there is no connection, when the session is resumed.
  send(message) {
    if (message.type === "session.input_audio.append") return this.sendSound(message);
    // A picture shows the present, so a picture that was lost is not sent later.
    if (message.type !== "session.input_image.append") {
      message.event_id = String(++this.messageCount);
      if (this.messages.push(message) > KEPT_MESSAGES) this.messages.shift();
    }
    if (this.ready) this.write(message);
  }

  sendSound(message) {
    this.packets.push(message);
    if (this.ready) {
      this.write(message);
      if (++this.sentPackets > KEPT_PACKETS) {
        this.droppedBytes += soundBytes(this.packets.shift());
        this.sentPackets--;
      }
    } else if (this.packets.length > this.sentPackets + QUEUED_PACKETS) {
      this.packets.splice(this.sentPackets, 1);
    }
  }

  // Sends again what the server has not received.
  // receivedBytes: bytes of sound that have arrived. lastMessage: number of the last other message that has arrived.
  sendAgain(receivedBytes, lastMessage) {
    let end = this.droppedBytes;
    this.packets = this.packets.filter((message) => (end += soundBytes(message)) > receivedBytes);
    this.sentPackets = this.packets.length;
    this.droppedBytes = receivedBytes;
    // These packets were recorded while the page was not muted. The session on the server may still be muted, and then
    // the server would drop them. So unmute it first.
    if (this.packets.length) this.write({ type: "session.input_audio.unmute" });
    this.packets.forEach((message) => this.write(message));
    this.messages = this.messages.filter((message) => Number(message.event_id) > lastMessage);
    this.messages.forEach((message) => this.write(message));
  }

  // Whether a picture would have to wait. Sound comes first.
  get busy() {
    return !this.ready || this.socket.bufferedAmount > 0;
  }

  onEvent(event) {
    if (event.sequence_number) this.lastNumber = event.sequence_number;
    if (event.type === "session.started") this.session = event.session;
    if (event.type === "session.started" || event.type === "session.resumed") {
      this.ready = true;
      this.attempts = 0;
      this.sendAgain(event.input_audio_bytes ?? 0, Number(event.last_client_event_id ?? 0));
      if (this.closing) this.write({ type: "session.close" }); // the first one may have been lost
      this.showState("Connected");
    }
    if (event.type === "session.closed") this.over = true;
    if (event.type === "error" && !this.ready) {
      this.over = true;
      const again = event.error.retry_after_s ? ` Try again in ${event.error.retry_after_s} s.` : "";
      this.showState(`${event.error.message}.${again}`, true);
    }
    this.dispatchEvent(new CustomEvent("event", { detail: event }));
  }

  onClose(code, reason) {
    this.ready = false;
    if (this.over) {
      if (this.session || this.closing) this.showState("The conversation is over");
    } else if (this.session && this.canResume()) {
      this.showState("Connection lost, coming back …", true);
      this.timer = setTimeout(() => this.connect(), Math.min(250 * 2 ** ++this.attempts, RECONNECT_MS));
      return;
    } else {
      this.showState(this.session ? "The connection is gone" : `No connection (${reason || code})`, true);
    }
    this.dispatchEvent(new Event("over"));
  }

  // Whether the server may still have the session.
  canResume() {
    if (!this.attempts) this.lostAt = performance.now();
    return performance.now() < this.lostAt + 1000 * this.session.resume.grace_s;
  }

  // Ends the conversation.
  close() {
    this.closing = true;
    if (this.ready) this.write({ type: "session.close" });
    else {
      this.over = true;
      clearTimeout(this.timer);
      if (this.socket.readyState === WebSocket.CLOSED) this.onClose();
      else this.socket.close(1000);
    }
  }

  showState(text, bad = false) {
    this.dispatchEvent(new CustomEvent("state", { detail: { text, bad } }));
  }
}

// Bytes of sound in a message, from the length of its base64.
function soundBytes({ audio }) {
  return (audio.length / 4) * 3 - (audio.endsWith("=") ? 1 : 0) - (audio.endsWith("==") ? 1 : 0);
}

// Returns samples in [-1, 1] as base64 of 16-bit little-endian PCM.
export function encode(samples) {
  const data = new DataView(new ArrayBuffer(2 * samples.length));
  samples.forEach((sample, i) => data.setInt16(2 * i, Math.max(-1, Math.min(1, sample)) * 32767, true));
  let text = "";
  for (const byte of new Uint8Array(data.buffer)) text += String.fromCharCode(byte);
  return btoa(text);
}

// Returns the samples of base64 of 16-bit little-endian PCM, in [-1, 1).
export function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const data = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => data.getInt16(2 * i, true) / 32768);
}
