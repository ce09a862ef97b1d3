// What every live figure brings with it. plotly.js, 5 MB, the page asks the kernel for when it first needs it, once for
// all of its figures: as a part of a figure's own state it would hold up all widgets of a page that is reloaded, and
// JupyterLab gives up on those that are not there after two seconds.

const KEY = "dnb: plotly VERSION";

function ask(model) {
  return new Promise((resolve, reject) => {
    const take = (content, buffers) => {
      if (content.dnb !== "code") return;
      model.off("msg:custom", take);
      const url = URL.createObjectURL(new Blob([buffers[0]], { type: "text/javascript" }));
      import(url).then(resolve, reject).finally(() => URL.revokeObjectURL(url));
    };
    model.on("msg:custom", take);
    model.send({ dnb: "code" });
  });
}

// What was painted while the code was loaded has reached no plot: the kernel sends all of it again, and from that very
// message on the figure listens.
function begin(figure, context) {
  const { model } = context;
  return new Promise((resolve) => {
    const take = () => {
      model.off("change:_widget_layout", take);
      figure.initialize(context);
      resolve();
    };
    model.on("change:_widget_layout", take);
    model.send({ dnb: "loaded" });
  });
}

async function load(context) {
  // kept when it is there, not while it is waited for: a kernel may end without an answer
  globalThis[KEY] ??= await ask(context.model);
  const figure = globalThis[KEY].default();
  await begin(figure, context);
  return figure;
}

// Even when it has come, a browser reads plotly.js for a second or two. Until then a page that was reloaded shows what it
// showed before: each view leaves its picture in the tab's storage when the page goes, all of a page in one entry.
const STILLS = "dnb: stills";
const stills = (globalThis[STILLS] ??= { before: stored(), now: {} });

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STILLS)) ?? {};
  } catch {
    return {}; // a frame that may keep nothing
  }
}

function leaveStill(name, el) {
  const layers = [...el.querySelectorAll(".main-svg")];
  if (!layers.length || !el.isConnected) return;
  const { width, height } = layers[0].getBoundingClientRect();
  // patterns are named by the page's address, which a picture does not know
  const shown = layers.map((layer) => new XMLSerializer().serializeToString(layer)).join("");
  const svg = shown.replaceAll(location.href.split("#")[0], "");
  stills.now[name] = { width, height, svg };
  try {
    sessionStorage.removeItem(STILLS);
    sessionStorage.setItem(STILLS, JSON.stringify(stills.now));
  } catch {
    // there is no room for it
  }
}

// As an image, in which no script runs.
function still(name) {
  const { width, height, svg } = stills.before[name] ?? {};
  if (!svg) return null;
  const image = new Image(width, height);
  const size = `width="${width}" height="${height}"`;
  const whole = `<svg xmlns="http://www.w3.org/2000/svg" ${size}>${svg}</svg>`;
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(whole)}`;
  image.alt = "the chart as it was before this page was reloaded";
  image.className = "dnb-still";
  image.style.cssText = "position:absolute; opacity:0.6; max-width:none";
  return image;
}

async function draw(figure, context) {
  const { model, el } = context;
  const name = model.get("_still_name");
  const before = still(name);
  if (before) {
    el.append(before);
    el.style.minHeight = `${before.height}px`;
  }
  const giveWay = ({ detail }) => {
    if (detail.element !== el) return;
    document.removeEventListener("plotlywidget-after-render", giveWay);
    before?.remove();
    delete stills.before[name];
    el.style.minHeight = "";
  };
  document.addEventListener("plotlywidget-after-render", giveWay);
  const leave = () => leaveStill(name, el);
  window.addEventListener("pagehide", leave);
  const stop = await (await figure).render(context);
  return () => {
    document.removeEventListener("plotlywidget-after-render", giveWay);
    window.removeEventListener("pagehide", leave);
    stop?.();
  };
}

export default () => {
  let figure;
  return {
    initialize(context) {
      figure = load(context); // not awaited: until this returns, messages of the kernel are held back
    },
    render: (context) => draw(figure, context),
  };
};
