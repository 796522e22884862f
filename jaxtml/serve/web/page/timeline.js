// Draws the last seconds of a conversation: both voices, the words at the times at which they were said, and the times
// in which the model's gate was open (the model had decided to speak). Also draws the history of latencies. Used by
// page.js. All times are in ms since the conversation began.

const SHOWN_MS = 20000; // width of the picture

export class Timeline {
  constructor(canvas) {
    this.canvas = canvas;
    this.clear();
    const draw = () => {
      this.draw();
      requestAnimationFrame(draw);
    };
    requestAnimationFrame(draw);
  }

  clear() {
    this.levels = { you: [], model: [] }; // [start, end, root mean square]
    this.gates = []; // [start, end] of each time in which the gate was open
    this.words = []; // [start, who, text]
    // The performance.now() at which the conversation would have begun if it had never stood still. null: not begun.
    this.began = null;
    this.stoppedAt = null; // time since which the conversation stands still, or null
  }

  get now() {
    return this.began === null ? 0 : (this.stoppedAt ?? performance.now()) - this.began;
  }

  // Whether the conversation goes on.
  get runs() {
    return this.began !== null && this.stoppedAt === null;
  }

  // Lets the conversation go on from `ms`.
  run(ms) {
    this.began = performance.now() - ms;
    this.stoppedAt = null;
  }

  // Stops the clock: the conversation is over, or its connection is lost. The server's clock stands still too.
  stop() {
    this.stoppedAt ??= performance.now();
  }

  // Adds a piece of a voice; `value` is its root mean square.
  level(who, start, end, value) {
    this.levels[who].push([start, end, value]);
  }

  // Adds a time in which the gate was open.
  gate(start, end) {
    const last = this.gates.at(-1);
    if (last && last[1] >= start) last[1] = end;
    else this.gates.push([start, end]);
  }

  // Adds words at the time at which they were said.
  word(who, start, text) {
    this.words.push([start, who, text]);
  }

  draw() {
    const { canvas, now } = this;
    const scale = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
    if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`);
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const from = Math.max(0, now + 600 - SHOWN_MS);
    const x = (ms) => ((ms - from) / SHOWN_MS) * width;
    for (const list of [this.levels.you, this.levels.model, this.gates]) {
      while (list.length && list[0][1] < from) list.shift();
    }
    while (this.words.length && this.words[0][0] < from - 5000) this.words.shift();

    pen.fillStyle = colour("gate");
    for (const [start, end] of this.gates) pen.fillRect(x(start), height / 2, x(end) - x(start), height / 2);
    pen.strokeStyle = colour("line");
    pen.fillStyle = colour("quiet");
    pen.font = "11px system-ui, sans-serif";
    for (let ms = Math.ceil(from / 1000) * 1000; ms < from + SHOWN_MS; ms += 1000) {
      pen.beginPath();
      pen.moveTo(x(ms), height - 4);
      pen.lineTo(x(ms), height);
      pen.stroke();
      if (ms % 5000 === 0) pen.fillText(`${ms / 1000} s`, x(ms) + 3, height - 4);
    }
    for (const [who, middle] of [["you", 0.3], ["model", 0.72]]) {
      pen.fillStyle = colour(who);
      for (const [start, end, value] of this.levels[who]) {
        const tall = Math.max(1, Math.min(1, value * 4) * height * 0.32);
        pen.fillRect(x(start), middle * height - tall / 2, Math.max(1, x(end) - x(start) - 0.5), tall);
      }
    }
    pen.font = "13px system-ui, sans-serif";
    const right = { you: -Infinity, model: -Infinity };
    for (const [start, who, text] of this.words) {
      pen.fillStyle = colour(who);
      const left = Math.max(x(start), right[who]);
      pen.fillText(text, left, who === "you" ? 14 : height / 2 + 14);
      right[who] = left + pen.measureText(text).width;
    }
    pen.strokeStyle = colour("text");
    pen.beginPath();
    pen.moveTo(x(now), 0);
    pen.lineTo(x(now), height);
    pen.stroke();
  }
}

// Draws latencies, in seconds, as bars. Bars end at 2 s.
export function drawHistory(canvas, latencies) {
  const scale = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const style = getComputedStyle(document.documentElement);
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  const most = 2;
  const wide = Math.min(28, width / Math.max(1, latencies.length));
  pen.font = "10px system-ui, sans-serif";
  latencies.forEach((seconds, i) => {
    const tall = (Math.min(seconds, most) / most) * (height - 16);
    pen.fillStyle = style.getPropertyValue("--model");
    pen.fillRect(i * wide + 2, height - tall, wide - 4, tall);
    pen.fillStyle = style.getPropertyValue("--quiet");
    pen.fillText(seconds.toFixed(1), i * wide + 4, height - tall - 3);
  });
}
