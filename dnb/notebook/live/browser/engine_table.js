// One row for each engine: state, name, place, a bar of its last seconds, processor, memory, share of the batch. A click
// or Enter unfolds the rest. Rows are changed where they are, so that what is unfolded or has the focus stays so.

const SHARES = ["compute", "data", "wait", "idle"];
const HEADS = { state: "engine", place: "", bar: "", cpu: "CPU", memory: "memory", share: "batch" };

function part(parent, kind, name) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  parent.append(made);
  return made;
}

// What has not changed is not touched: a page lays out anew whatever is.
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function set(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

function head(list) {
  const row = part(list, "div", "dnb-head");
  row.setAttribute("aria-hidden", "true");
  for (const [name, text] of Object.entries(HEADS)) {
    const cell = part(row, "span", `dnb-${name}`);
    cell.textContent = text;
    if (name !== "bar") continue;
    for (const share of SHARES) {
      const key = part(cell, "span", "dnb-key");
      part(key, "i", `dnb-${share}`);
      key.append(share);
    }
  }
  return row;
}

class EngineRow {
  constructor(list, id) {
    this.item = part(list, "div", "dnb-row");
    this.item.setAttribute("role", "listitem");
    this.button = part(this.item, "button");
    this.button.type = "button";
    this.button.setAttribute("aria-expanded", "false");
    this.button.onclick = () => this.unfold(this.more.hidden);
    this.cells = {};
    for (const name of Object.keys(HEADS)) this.cells[name] = part(this.button, "span", `dnb-${name}`);
    this.mark = part(this.cells.state, "span", "dnb-mark");
    this.mark.setAttribute("aria-hidden", "true");
    this.name = part(this.cells.state, "b");
    this.name.textContent = `engine ${id}`;
    this.word = part(this.cells.state, "span", "dnb-word");
    this.cells.bar.setAttribute("role", "img");
    this.bars = SHARES.map((share) => part(this.cells.bar, "span", `dnb-${share}`));
    this.more = part(this.item, "dl", "dnb-more");
    this.more.hidden = true;
  }

  unfold(isOpen) {
    this.more.hidden = !isOpen;
    this.button.setAttribute("aria-expanded", String(isOpen));
  }

  show(row) {
    set(this.item, "class", `dnb-row dnb-is-${row.kind}`);
    say(this.mark, row.mark);
    say(this.word, row.word);
    set(this.word, "class", row.is_news ? "dnb-word" : "dnb-word dnb-unseen");
    say(this.cells.place, row.place);
    set(this.cells.place, "title", row.place);
    for (const [place, percent] of row.shares.entries()) {
      const bar = this.bars[place];
      if (bar.style.width !== `${percent}%`) bar.style.width = `${percent}%`;
      say(bar, percent >= 12 && place !== 3 ? `${percent}%` : "");
    }
    const words = row.shares.map((percent, place) => `${SHARES[place]} ${percent} %`);
    const told = row.shares.some((percent) => percent) ? words.join(", ") : "no shares of time yet";
    set(this.cells.bar, "aria-label", told);
    set(this.cells.bar, "title", told);
    for (const name of ["cpu", "memory", "share"]) {
      say(this.cells[name], row[name]);
      set(this.cells[name], "aria-label", row[name] && `${HEADS[name]} ${row[name]}`);
    }
    this.tell(row.more);
  }

  tell(facts) {
    while (this.more.children.length > 2 * facts.length) this.more.lastChild.remove();
    while (this.more.children.length < 2 * facts.length) part(this.more, this.more.children.length % 2 ? "dd" : "dt");
    for (const [place, text] of facts.flat().entries()) say(this.more.children[place], text);
  }
}

// Rounded, so that a scroll bar that comes and goes is no news.
function watchWidth(model, el) {
  const observer = new ResizeObserver(() => {
    const width = 20 * Math.floor(el.clientWidth / 20);
    if (!width || width === model.get("page_width")) return;
    model.set("page_width", width);
    model.save_changes();
  });
  observer.observe(el);
  return () => observer.disconnect();
}

function render({ model, el }) {
  el.classList.add("dnb-engines");
  const list = part(el, "div", "dnb-list");
  list.setAttribute("role", "list");
  list.setAttribute("aria-label", "engines");
  const top = head(list);
  const crowd = part(el, "div", "dnb-crowd");
  const rows = new Map();

  function show() {
    const shown = model.get("rows");
    const ids = new Set(shown.map((row) => row.engine));
    for (const [id, row] of rows) {
      if (ids.has(id)) continue;
      row.item.remove();
      rows.delete(id);
    }
    for (const [place, row] of shown.entries()) {
      if (!rows.has(row.engine)) rows.set(row.engine, new EngineRow(list, row.engine));
      const { item } = rows.get(row.engine);
      if (list.children[place + 1] !== item) list.insertBefore(item, list.children[place + 1] ?? null);
      rows.get(row.engine).show(row);
    }
    list.hidden = !shown.length;
    top.hidden = !shown.length;
  }

  // Made by the kernel, and escaped there.
  function showCrowd() {
    crowd.innerHTML = model.get("crowd");
  }

  model.on("change:rows", show);
  model.on("change:crowd", showCrowd);
  show();
  showCrowd();
  const rest = watchWidth(model, el);
  return () => {
    rest();
    model.off("change:rows", show);
    model.off("change:crowd", showCrowd);
    model.send({ dnb: "gone" });
  };
}

export default { render };
