// What the page says when something does not work: what is wrong, and what the visitor can do. Used by page.js.
//
// A message is { text, advice }: `text` is short and shown in bold, `advice` is whole sentences.

const TYPE_INSTEAD = "You can also type.";

// Returns what to say when a microphone or a camera cannot be had. `device`: "microphone" or "camera". `button`: the
// label of the button that asks for the device again. `error`: from `getUserMedia`.
export function deviceTrouble(error, device, button) {
  const instead = device === "microphone" ? ` ${TYPE_INSTEAD}` : "";
  if (error.name === "NotAllowedError" && /system/i.test(error.message)) {
    return {
      text: `The system keeps the ${device} from your browser`,
      advice: `Allow it in the privacy settings of your system, then press ${button} again.${instead}`,
    };
  }
  if (error.name === "NotAllowedError") {
    return {
      text: `The ${device} was not allowed`,
      advice:
        `Press ${button} again and choose Allow. If your browser no longer asks, click the icon beside the address ` +
        `of this page and allow the ${device} there.${instead}`,
    };
  }
  if (error.name === "NotFoundError") {
    return { text: `No ${device} was found`, advice: `Connect one, then press ${button} again.${instead}` };
  }
  if (error.name === "NotReadableError" || error.name === "AbortError") {
    return {
      text: `The ${device} cannot be opened`,
      advice: `Another program may be using it: close that program, then press ${button} again.${instead}`,
    };
  }
  return { text: `The ${device} cannot be used`, advice: `${sentence(error.message)}${instead}` };
}

// An error that knows what to say to the visitor.
export class Trouble extends Error {
  constructor(shown) {
    super(shown.text);
    this.shown = shown;
  }
}

// Returns what to say where the browser gives the page no microphone.
export function noMicrophone() {
  return {
    text: window.isSecureContext ? "This browser gives the page no microphone" : "No microphone over plain http",
    advice:
      "Browsers give a microphone only to pages that come over https or from the same machine. Ask for an https " +
      `address of this server, or open ${localAddress()} on the server's own machine. Typing works here: the answers come as ` +
      "words.",
  };
}

export const MICROPHONE_GONE = {
  text: "The microphone has stopped",
  advice: `It was unplugged, or the browser took it away. Press Talk to use a microphone again. ${TYPE_INSTEAD}`,
};
export const MICROPHONE_OFF = {
  text: "Your system has muted the microphone",
  advice: `Switch it on there, or at the microphone itself. ${TYPE_INSTEAD}`,
};
export const MICROPHONE_SILENT = {
  text: "No sound comes from your microphone",
  advice: `Is it switched on? Your browser's menu beside the address chooses another one. ${TYPE_INSTEAD}`,
};
export const SOUND_WAITS = {
  text: "Your browser has not started the sound",
  advice: "Click on this page. If that does not help, check the sound output of your device, and reload the page. " +
    "You can type meanwhile.",
};
export const NO_SOUND = {
  text: "This browser plays no sound here",
  advice: "Type your sentences, and read the answers below. For voices, use a current browser over https.",
};
export const NO_SERVER = {
  text: "The server does not answer",
  advice: "Is it running? This page asks again by itself.",
};
export const ASKING = { text: "Waiting for the microphone", advice: "Your browser asks for it: choose Allow." };
export const LOADING = { text: "Loading the recording …", advice: "" };
export const ENDING = { text: "Ending …", advice: "The model finishes speaking. Press End again to end at once." };
export const LOST = { text: "Connection lost, coming back …", advice: "The conversation waits meanwhile." };
const AGAIN = "Press Talk or type for a new one.";

// Returns what to say when a conversation is over. `reason`: from `session.closed`.
export function ended(reason) {
  if (reason === "expired") {
    return { text: "The server has ended the conversation", advice: `Its time was up, or the server stops. ${AGAIN}` };
  }
  if (reason === "connection_lost") {
    return { text: "The server has ended the conversation", advice: `The connection or the server failed. ${AGAIN}` };
  }
  return { text: "The conversation is over", advice: AGAIN };
}

// Returns what to say when the server is about to end the conversation. leftMs: the time that is left, in ms.
export function goingAway(leftMs) {
  return { text: `The server ends this conversation in ${duration(leftMs / 1000)}`, advice: "" };
}

// Returns what to say when a connection did not come back. `seconds`: how long the server kept the conversation.
export function notResumed(seconds) {
  return { text: "The connection did not come back", advice: `The server waited ${seconds} s for it. ${AGAIN}` };
}

// Returns what to say when the server refuses. `error`: { code, message, retry_after_s? } from the server.
export function refusal(error) {
  const wait = error.retry_after_s;
  const again = wait ? ` Try again in ${duration(wait)}.` : "";
  switch (error.code) {
    case "server_full":
      return { text: "The server is full", advice: `All its places are taken.${again}` };
    case "draining":
      return { text: "The server is about to stop", advice: again.trim() || "Try again later." };
    case "session_limit_exceeded":
      return { text: "This key has too many conversations open", advice: `End one of them.${again}` };
    case "quota_exceeded":
      return { text: "The minutes of this key are used up", advice: again.trim() || "Use another key." };
    case "rate_limit_exceeded":
      return { text: "Too many conversations in one minute", advice: again.trim() || "Try again in a minute." };
    case "insufficient_scope":
      return { text: "This key is not for this page", advice: "Use a key whose scopes include “live”." };
    case "missing_api_key":
      return { text: "This server asks for a key", advice: "Enter the key below. Whoever runs the server gives you one." };
    case "invalid_api_key":
      return { text: "The server does not know this key", advice: "Check it and enter it again." };
    case "expired_api_key":
      return { text: "This key has expired", advice: "Enter another one." };
    case "model_not_found":
      return { text: "The server has another model now", advice: "Reload this page." };
    case "session_not_found":
    case "resync_required":
    case "invalid_resume_token":
      return { text: "The conversation could not go on", advice: `The server no longer has it. ${AGAIN}` };
    case "origin_not_allowed":
      return {
        text: "This server does not accept pages from this address",
        advice: `${sentence(error.message)} On the server's own machine, open ${localAddress()} instead.`,
      };
  }
  const advice = wait && !/again/.test(error.message) ? again.trim() : "";
  return { text: "The server refused", advice: `${sentence(error.message)} ${advice}`.trim() };
}

// Returns the error in an answer of the server over HTTP, for `refusal`. A proxy may have answered in its place.
export async function errorOf(answer) {
  const wait = Number(answer.headers.get("Retry-After")) || undefined;
  try {
    const { code, message } = (await answer.json()).error;
    return { code, message: String(message), retry_after_s: wait };
  } catch {
    return { code: "", message: `${answer.url} was answered with status ${answer.status}`, retry_after_s: wait };
  }
}

// Finds out why the page could not load a part of itself. error: what the browser says.
export async function whyNotLoaded(error) {
  try {
    await fetch("health");
  } catch {
    return NO_SERVER;
  }
  return {
    text: "This page could not start its sound",
    advice: `${sentence(error.message)} Reload the page and try again. ${TYPE_INSTEAD}`,
  };
}

// Finds out why a WebSocket could not be opened: browsers do not say.
export async function whyNotConnected(key) {
  let answer;
  try {
    // A POST carries the page's origin and key, as the WebSocket does. The empty body begins no conversation.
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    answer = await fetch("v1/live/sessions", { method: "POST", headers, body: "{}" });
  } catch {
    return NO_SERVER;
  }
  if (answer.status !== 400) return refusal(await errorOf(answer));
  return {
    text: "The page cannot open its connection to the server",
    advice:
      "The server answers, but a WebSocket to it cannot be opened. If a proxy stands between, it must pass on upgrades " +
      "to WebSockets.",
  };
}

// Returns the address of this page on the server's own machine. There, a browser trusts even plain http.
function localAddress() {
  return `http://localhost${location.port && `:${location.port}`}${location.pathname}`;
}

// Returns seconds in the unit that a person would use.
function duration(seconds) {
  if (seconds < 100) return `${Math.ceil(seconds)} s`;
  return seconds < 6000 ? `${Math.ceil(seconds / 60)} minutes` : `${Math.ceil(seconds / 3600)} hours`;
}

// Returns text as a sentence: with a capital and a full stop.
export function sentence(text) {
  const trimmed = text.trim().replace(/\.$/, "");
  return trimmed && `${trimmed[0].toUpperCase()}${trimmed.slice(1)}.`;
}
