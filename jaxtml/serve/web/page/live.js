// A client of the GPT-Live protocol: one session, over as many connections as it takes. Used by page.js.
//
// When a connection is lost, the client connects again and resumes the session. The server says how much of the
// client's sound it has received, and the number of the last other message that it has received. The client then sends
// everything after that again.

const BACK_SOON = 4001; // close code: the session waits some seconds, see "How a session ends" in docs/serving.md
const RECONNECT_MS = 4000; // the longest time between two attempts to reconnect
const ANSWER_MS = 10000; // the server must answer a new connection within this time
const KEPT_PACKETS = 500; // packets of sound that were sent and may have been lost on the way
const QUEUED_PACKETS = 100; // packets of sound that wait for a connection
const KEPT_MESSAGES = 100; // other messages that may have been lost on the way

export class Live extends EventTarget {
  // model: name of the model. key: key of the server, or "". saved: what `save` returned for a session that goes on, or
  // null for a new session.
  // Dispatches
  // - `event` (detail: an event of the server),
  // - `state` (detail: "connecting", "connected" or "lost"), and
  // - `over` (the conversation is over; detail: why, for one of the functions in messages.js: { reason } from the
  //   server, { refused: error } by the server, { unreachable }, { lost: seconds of grace } or { gone } for a saved
  //   session that the server no longer has).
  constructor(model, key, saved = null) {
    super();
    this.model = model;
    this.key = key;
    this.lastNumber = saved?.lastNumber ?? 0; // `sequence_number` of the last event that was received
    this.session = saved?.session ?? null; // as in `session.started`
    this.restoring = saved !== null; // whether the session is saved and not yet resumed
    this.ready = false; // whether the connection carries the session
    this.end = null; // why the session has ended: the detail of `over`
    this.closing = false; // whether the user has ended the conversation
    this.attempts = 0; // attempts to reconnect since the connection was lost
    this.messages = saved?.messages ?? []; // the last messages without sound and pictures; `event_id` is their number
    this.messageCount = saved?.messageCount ?? 0;
    this.packets = []; // the last messages with sound, in order
    this.sentPackets = 0; // how many of `packets` were sent, from the first on
    this.droppedBytes = 0; // bytes of sound in the packets that are no longer in `packets`
    this.connect();
  }

  // Returns what the page needs to go on with the session after a reload, as JSON can hold it; null if there is nothing
  // to go on with.
  save() {
    const { session, lastNumber, messages, messageCount } = this;
    return session && !this.end && !this.closing ? { session, lastNumber, messages, messageCount } : null;
  }

  // Lets go of the session when the page goes away. The page cannot know whether it is left or loaded again. So the
  // server keeps the session for some seconds, as long as nobody else needs its place.
  leave() {
    if (this.save() && this.socket.readyState === WebSocket.OPEN) this.socket.close(BACK_SOON);
  }

  connect() {
    if (this.end) return;
    // A router in front of several servers finds the session's server by this parameter.
    const query = this.session ? `?session_id=${encodeURIComponent(this.session.id)}` : "";
    const address = new URL(`v1/live/sessions${query}`, document.baseURI); // the page may be under any path
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    // A browser cannot set headers of a WebSocket, so the key is sent as a subprotocol.
    const protocols = this.key ? ["realtime", `openai-insecure-api-key.${this.key}`] : ["realtime"];
    this.ready = false;
    try {
      this.socket = new WebSocket(address, protocols);
    } catch { // the key has characters that a subprotocol cannot have
      const refused = { code: "invalid_api_key", message: "the key has characters that no key has" };
      setTimeout(() => this.finish({ refused }));
      return;
    }
    this.timer = setTimeout(() => this.socket.close(), ANSWER_MS);
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
    this.socket.onclose = () => this.onClose();
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
      clearTimeout(this.timer);
      this.ready = true;
      this.restoring = false;
      this.attempts = 0;
      this.sendAgain(event.input_audio_bytes ?? 0, Number(event.last_client_event_id ?? 0));
      if (this.closing) this.write({ type: "session.close" }); // the first one may have been lost
      this.showState("connected");
    }
    if (event.type === "session.closed") this.end = { reason: event.reason };
    if (event.type === "error" && !this.ready) {
      return this.abandon(this.restoring ? { gone: true } : { refused: event.error });
    }
    this.dispatchEvent(new CustomEvent("event", { detail: event }));
  }

  onClose() {
    clearTimeout(this.timer);
    const wasReady = this.ready;
    this.ready = false;
    if (this.end) return this.finish(this.end);
    if (this.closing && !this.session) return this.finish({ reason: "close_requested" });
    if (!this.session) return this.finish({ unreachable: true });
    if (!this.canResume()) return this.finish(this.restoring ? { gone: true } : { lost: this.session.resume.grace_s });
    if (wasReady) this.showState("lost");
    this.timer = setTimeout(() => this.connect(), Math.min(250 * 2 ** ++this.attempts, RECONNECT_MS));
  }

  finish(end) {
    this.end = end;
    this.dispatchEvent(new CustomEvent("over", { detail: end }));
  }

  // Whether the server may still have the session.
  canResume() {
    if (!this.attempts) this.lostAt = performance.now();
    return performance.now() < this.lostAt + 1000 * this.session.resume.grace_s;
  }

  // Ends the conversation: when the model has finished speaking, or at once if this is the second call.
  close() {
    const again = this.closing;
    this.closing = true;
    if (this.ready && !again) return this.write({ type: "session.close" });
    if (this.session && !this.ready) this.hangUp();
    this.abandon({ reason: "close_requested" });
  }

  // Ends the conversation without waiting for the server.
  abandon(end) {
    clearTimeout(this.timer);
    this.socket.onclose = this.socket.onmessage = null;
    this.socket.close(1000); // ends the session on the server, if this connection carries one
    this.ready = false;
    this.finish(end);
  }

  // Ends a session that no connection carries. Otherwise the server would keep its place for a client that comes back.
  hangUp() {
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    const path = `v1/live/sessions/${encodeURIComponent(this.session.id)}/hangup`;
    fetch(path, { method: "POST", headers, keepalive: true }).catch(() => {}); // the server then waits in vain
  }

  showState(state) {
    this.dispatchEvent(new CustomEvent("state", { detail: state }));
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
