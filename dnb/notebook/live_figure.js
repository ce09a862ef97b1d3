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

export default () => {
  let figure;
  return {
    initialize(context) {
      figure = load(context); // not awaited: until this returns, messages of the kernel are held back
    },
    render: async (context) => (await figure).render(context),
  };
};
