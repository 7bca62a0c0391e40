"use strict";
// The page's only data are in #data; what models wrote is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

// Charts

function draw(place, figure, height) {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  const touch = matchMedia("(pointer: coarse)").matches;  // a finger on a chart scrolls the page
  const paper = "rgba(0,0,0,0)";
  const font = { color: ink, size: 11, family: "system-ui, sans-serif" };
  const layout = {
    ...figure.layout,
    title: { text: figure.layout.title?.text ?? "", font: { size: 13 }, x: 0.03, xanchor: "left" },
    height, font, paper_bgcolor: paper, plot_bgcolor: paper, margin: { l: 48, r: 16, t: 40, b: 34 },
    xaxis: { ...figure.layout.xaxis, ...axis }, yaxis: { ...figure.layout.yaxis, ...axis },
    dragmode: touch ? false : "zoom", hovermode: figure.layout.barmode ? "closest" : "x", legend: { orientation: "h", y: -0.2 },
  };
  Plotly.react(place, figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
}

function drawAll() {
  const charts = document.getElementById("charts");
  data.charts.forEach((figure, i) => {
    const place = charts.children[i] ?? charts.appendChild(document.createElement("div"));
    draw(place, figure, 240);
  });
  if (data.timeline) draw(document.getElementById("timeline"), data.timeline, 230);
}
drawAll();
dark.addEventListener("change", drawAll);

// Responses

const filters = document.getElementById("filters");
const joined = (line) => line.tokens.map((token) => data.pieces[token]).join("");
const textOf = new Map(data.responses.map((line) => [line, data.pieces ? joined(line) : line.text]));
const groups = new Map();
for (const line of data.responses) {
  const key = `${line.step}/${line.group}`;
  if (!groups.has(key)) groups.set(key, []);
  groups.get(key).push(line);
}
let shown = null;

function fill(name, values) {
  for (const value of values) filters.elements[name].add(new Option(value, value));
}
const distinct = (key) => [...new Set(data.responses.map((line) => line[key]))].filter((value) => value !== null);

function passes(line) {
  const filter = Object.fromEntries(new FormData(filters));
  const words = filter.text.toLowerCase();
  return (!filter.step || line.step === Number(filter.step))
    && (!filter.label || line.label === filter.label)
    && (!filter.reward || String(line.reward) === filter.reward)
    && (!filter.shortest || line.length >= Number(filter.shortest))
    && (!filter.longest || line.length <= Number(filter.longest))
    && (!words || textOf.get(line).toLowerCase().includes(words) || line.prompt.toLowerCase().includes(words)
      || line.uid.toLowerCase().includes(words));
}

// A value of a row or a judge: text as it is, anything else as JSON.
function written(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

function element(kind, words, name) {
  const made = document.createElement(kind);
  if (words !== undefined) made.textContent = words;
  if (name) made.className = name;
  return made;
}

function list() {
  const place = document.getElementById("groups");
  const matching = [...groups].filter(([, lines]) => lines.some(passes));
  document.getElementById("count").textContent = `${matching.length} of ${groups.size} groups`;
  place.replaceChildren(...matching.slice(0, 500).map(([key, lines]) => {
    const button = element("button");
    const dots = element("span", undefined, "dots");
    for (const line of lines) dots.append(element("span", passes(line) ? "●" : "○", line.label));
    const right = lines.filter((line) => line.label === "correct").length;
    const about = element("span", ` step ${lines[0].step} · ${right} of ${lines.length} right`, "quiet");
    button.append(element("span", lines[0].question || lines[0].uid, "question"), dots, about);
    button.setAttribute("aria-current", String(key === shown));
    button.addEventListener("click", () => { shown = key; list(); show(true); });
    const item = element("li");
    item.append(button);
    return item;
  }));
}

function colour(line, i) {
  const by = filters.elements.colour.value;
  // A number that is not finite is a text, such as "-inf", and stands out.
  if (by === "logprob") {
    const logprob = line.logprobs[i];
    return `rgba(var(--hot), ${typeof logprob === "string" ? 1 : Math.min(0.75, -logprob / 4)})`;
  }
  if (by === "advantage" && line.advantage !== null) {
    const strength = typeof line.advantage === "string" ? 1 : Math.min(0.6, Math.abs(line.advantage) / 2);
    return `rgba(var(${line.advantage > 0 ? "--cold" : "--hot"}), ${strength})`;
  }
  return "";
}

function response(line) {
  const place = element("pre");
  if (!data.pieces) {
    place.textContent = textOf.get(line);
    return place;
  }
  const between = new Map(line.cut ? [] : line.between);  // of an agent: what no model wrote, and nothing trains on
  line.tokens.forEach((token, i) => {
    if (between.has(i)) place.append(element("span", between.get(i), "between"));
    if (line.cut && i === line.tokens.length / 2) place.append(element("span", `\n… ${line.cut} tokens …\n`, "quiet"));
    const piece = element("span", data.pieces[token]);
    piece.style.background = colour(line, i);
    piece.title = `log-prob ${line.logprobs[i]}, advantage ${line.advantage ?? "none"}`;
    place.append(piece);
  });
  return place;
}

function show(opened) {
  const lines = groups.get(shown);
  if (!lines) return;
  const samples = element("div", undefined, "samples");
  for (const line of lines) {
    const card = element("article", undefined, passes(line) ? "sample" : "sample other");
    const head = element("h3", line.label, line.label);
    const got = line.extracted === null || line.extracted === "" ? "" : ` · read as ${written(line.extracted)}`;
    const end = { length: "cut at the limit", abort: "aborted" }[line.finish_reason] ?? "ended by itself";
    if (line.branch) head.textContent += ` · branch ${line.branch}`;
    card.append(head, element("p", `${line.length} tokens · ${end} · reward ${line.reward ?? "none"}`
      + ` · advantage ${line.advantage ?? "none"}${got}${line.why ? ` · ${line.why}` : ""}`, "quiet"));
    card.append(response(line));
    samples.append(card);
  }
  const prompt = element("pre", lines[0].prompt, "prompt");
  const { uid, draw, gold } = lines[0];
  const times = draw ? ` · drawn before: ${draw === 1 ? "once" : `${draw} times`}` : "";
  const reference = element("p", `${uid}${times} · reference answer: ${written(gold)}`, "quiet");
  document.getElementById("group").replaceChildren(reference, prompt, samples);
  if (opened && matchMedia("(max-width: 720px)").matches) reference.scrollIntoView();
}

if (filters) {  // absent for a run without responses (of `pekoe sft`)
  fill("step", distinct("step").sort((a, b) => a - b));
  fill("label", distinct("label").sort());
  fill("reward", distinct("reward").sort((a, b) => a - b || 0));
  filters.addEventListener("input", () => { list(); show(); });
  filters.addEventListener("submit", (event) => event.preventDefault());
  list();
}

// Following a run: reload the page when the run has grown, unless the reader has opened a response.

if ("live" in document.body.dataset) {
  let seen = null;
  setInterval(async () => {
    let now;
    try {
      now = await (await fetch("state")).text();
    } catch {
      document.getElementById("news").textContent = " · the server has stopped";
      return;
    }
    if (seen !== null && now !== seen) {
      if (shown === null) location.reload();
      else document.getElementById("news").textContent = " · the run has grown: reload the page";
    }
    seen ??= now;
  }, 3000);
}
