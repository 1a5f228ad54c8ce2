// Drives the page through its own events and leaves what it saw in the document.
{
addEventListener("error", event => report({error: event.message}));
const report = found => {
  const box = document.createElement("pre");
  box.id = "report"; box.textContent = JSON.stringify(found);
  document.body.append(box);
};
const pointer = (type, element, x, y) => element.dispatchEvent(
  new PointerEvent(type, {bubbles: true, clientX: x, clientY: y, pointerId: 1}));
const press = element => {
  const box = element.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
  pointer("pointerdown", element, x, y); pointer("pointerup", element, x, y);
};
const stage = document.getElementById("stage"), search = document.getElementById("search");
const picture = () => stage.querySelector("svg");
const dim = () => picture().querySelectorAll(".dim").length;
const found = {views: [...document.getElementById("view").options].map(o => o.value)};
found.rows = [...document.querySelectorAll(".row b")].map(b => b.textContent);
const cell = [...picture().querySelectorAll("text")].filter(t => t.textContent.startsWith("ffn_channel")).pop();
found.before = dim();
press(cell);
found.dimmed = dim();
found.selected = document.querySelector(".row[aria-pressed=true] b").textContent;
found.detail = document.getElementById("detail").textContent;
press(cell);
found.released = dim();
const link = [...picture().querySelectorAll("a[data-hint]")].find(a => a.dataset.hint.includes("linear:"));
const inner = link.querySelector("path, polygon, text") ?? link;
inner.dispatchEvent(new MouseEvent("mousemove", {bubbles: true, clientX: 50, clientY: 50}));
found.hint = document.getElementById("hint").hidden ? null : document.getElementById("hint").textContent;
const place = () => picture().style.transform;
found.places = [place()];
stage.dispatchEvent(new WheelEvent("wheel", {bubbles: true, cancelable: true, deltaY: -200, clientX: 700, clientY: 400}));
found.places.push(place());
pointer("pointerdown", stage, 500, 300);
stage.setPointerCapture = () => {};
pointer("pointermove", stage, 560, 340); pointer("pointerup", stage, 560, 340);
found.places.push(place());
search.value = "mlp.gate"; search.dispatchEvent(new Event("input"));
found.kept = [...picture().querySelectorAll("g.node:not(.dim)")].length;
found.listed = [...document.querySelectorAll(".row:not([hidden])")].length;
document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
found.cleared = dim();
const view = document.getElementById("view");
found.drawn = [...view.options].map(option => {
  view.value = option.value; view.onchange();
  const box = picture().getBoundingClientRect();
  return box.width > 50 && box.height > 50;
});
found.requests = performance.getEntriesByType("resource").map(entry => entry.name);
report(found);
}
