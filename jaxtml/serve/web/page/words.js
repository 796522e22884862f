// The list of what was heard, typed and said, and the tasks that the model hands over. Used by page.js.

const PAUSE_MS = 2500; // words that come later than this after the last ones begin a new line

export class WordList {
  // list: the HTML list. onWords(who, ms, text): called with every piece of text.
  constructor(list, onWords) {
    this.list = list;
    this.onWords = onWords;
    this.clear();
  }

  clear() {
    this.lines = []; // { who, typed, ms, text } of every line
    this.list.replaceChildren();
    this.endLine("you");
    this.endLine("model");
  }

  // Adds words to the open line of `who` ("you" or "model"), or to a new line. ms: their time in the conversation.
  add(who, ms, text) {
    this.onWords(who, ms, text);
    const open = this.open?.[who];
    if (!open || ms - open.ms >= PAUSE_MS) return this.addLine(who, ms, text, false);
    open.line.text += text;
    open.item.lastChild.textContent += text;
    open.ms = ms;
  }

  // Adds a line of text that the user typed. Words that are heard meanwhile do not join it.
  addTyped(ms, text) {
    this.onWords("you", ms, ` ${text}`);
    this.addLine("you", ms, text, true);
  }

  // The next words of `who` begin a new line.
  endLine(who) {
    this.open = { ...this.open, [who]: null };
  }

  addLine(who, ms, text, typed) {
    const item = document.createElement("li");
    item.className = who;
    const time = document.createElement("time");
    time.textContent = `${(ms / 1000).toFixed(1)} s`;
    const name = document.createElement("b");
    name.textContent = { you: typed ? "You typed" : "You", model: "Model" }[who];
    item.append(time, name, document.createTextNode(text.trimStart()));
    this.list.append(item);
    this.list.scrollTop = this.list.scrollHeight;
    const line = { who, typed, ms, text };
    this.lines.push(line);
    this.open = { ...this.open, [who]: typed ? null : { item, line, ms } };
  }

  // Shows the lines of a conversation that goes on after a reload.
  restore(lines) {
    for (const { who, ms, text, typed } of lines) this.addLine(who, ms, text, typed);
    this.endLine("you");
    this.endLine("model");
  }
}

// Adds a task of the model to a list, with a field for the user's answer. onAnswer(text): returns whether it was sent.
export function showDelegation(list, { id, task }, onAnswer) {
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
    if (!input.value.trim() || !onAnswer(input.value)) return;
    input.readOnly = button.disabled = true; // a read-only field keeps the focus, a disabled one would not
  };
  item.append(form);
  list.append(item);
}
