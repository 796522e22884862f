// What a visitor is told about the served model: what it understands, and sentences to try. Used by page.js.
//
// The page knows the shipped model `tiny`, whose task is in jaxtml/data/tasks/scenarios.py. Of any other model it says
// only what holds for all models of this project.

// What a person may try with every model.
const CONDUCT = [
  ["Talk while it talks", "It hears you, and stops when you mean it to."],
  ["Stop in the middle of a sentence", "It waits, and does not take the turn from you."],
];

const TIPS =
  "You may talk while it talks: it hears you, and stops when you mean it to. You may stop in the middle of a sentence: " +
  "it waits.";

const TINY = {
  limits:
    "It is a small demonstration, not an assistant: it understands only short English sentences like those below. " +
    "Anything else gets a wrong answer or none. It mishears many voices, but reads typed words well.",
  sentences: [
    ["what is three plus four", "sums with numbers up to twelve"],
    ["repeat after me red green", "colours, days, months, animals"],
    ["is july a month", "yes or no"],
    ["is four more than two", "numbers up to twenty"],
    ["the code is three nine one", "says the digits back"],
    ["good morning", "greetings"],
  ],
  tips: TIPS,
  write: spellOut,
};

// Returns what the page says about the model of that name:
// - `limits`: what the model understands, or "",
// - `sentences`: [what to say, what kind of sentence it is], or none,
// - `conduct`: [what to do, what the model then does], to try where there are no sentences,
// - `tips`: the same as text, for below the sentences, or "",
// - `write(text)`: typed text as the model knows text.
export function aboutModel(name) {
  const any = { limits: "", sentences: [], conduct: CONDUCT, tips: "", write: (text) => text };
  return name === "tiny" ? { ...any, ...TINY } : any;
}

const ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen " +
  "seventeen eighteen nineteen").split(" ");
const TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split(" ");

// Returns text as `tiny` was trained on text: small letters, no punctuation, numbers in words. "What is 3 + 42?"
// becomes "what is three plus forty two". A number of three or more digits becomes its digits, as in a code.
export function spellOut(text) {
  return text
    .toLowerCase()
    .replace(/colors?\b/g, (word) => word.replace("color", "colour"))
    .replace(/\+/g, " plus ")
    .replace(/(\d)\s*[-−–]\s*(?=\d)/g, "$1 minus ")
    .replace(/\d+/g, (digits) => ` ${numberWords(digits)} `)
    .replace(/[^a-z]+/g, " ")
    .trim();
}

function numberWords(digits) {
  if (digits.length > 2 || (digits.length === 2 && digits[0] === "0")) return [...digits].map((d) => ONES[d]).join(" ");
  const value = Number(digits);
  if (value < 20) return ONES[value];
  return TENS[Math.floor(value / 10) - 2] + (value % 10 ? ` ${ONES[value % 10]}` : "");
}
