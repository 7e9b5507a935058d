// Shows the values under the pointer. Everything is on the page already; without scripts it reads as well.
for (const svg of document.querySelectorAll("svg.chart")) {
  const box = svg.parentElement.querySelector(".values");
  const curves = [...svg.querySelectorAll("[data-x]")].map((e) => ({
    name: e.dataset.name,
    x: e.dataset.x.split(" ").map(Number),
    y: e.dataset.y.split(" ").map(Number),
  }));
  if (!curves.length) continue;
  const ends = curves.flatMap((c) => [c.x[0], c.x[c.x.length - 1]]);
  const [first, last] = [Math.min(...ends), Math.max(...ends)];
  const { left, right, top, bottom } = svg.dataset;
  const rule = document.createElementNS("http://www.w3.org/2000/svg", "line");
  rule.setAttribute("class", "rule");
  rule.setAttribute("y1", top);
  rule.setAttribute("y2", bottom);
  rule.setAttribute("visibility", "hidden");
  svg.append(rule);
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const share = Math.min(1, Math.max(0, (at - left) / (right - left)));
    const x = first + share * (last - first);
    const words = [];
    for (const c of curves) {
      let a = 0, b = c.x.length - 1;
      while (b - a > 1) c.x[(a + b) >> 1] <= x ? (a = (a + b) >> 1) : (b = (a + b) >> 1);
      const i = Math.abs(c.x[a] - x) <= Math.abs(c.x[b] - x) ? a : b;
      if (!words.length) words.push(`step ${c.x[i].toLocaleString("en")}`);
      words.push(`${c.name} ${Number(c.y[i].toPrecision(5))}`);
    }
    rule.setAttribute("x1", Number(left) + share * (right - left));
    rule.setAttribute("x2", Number(left) + share * (right - left));
    rule.setAttribute("visibility", "visible");
    box.textContent = words.join("   ");
  });
  svg.addEventListener("pointerleave", () => {
    rule.setAttribute("visibility", "hidden");
    box.textContent = "";
  });
}
