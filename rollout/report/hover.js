// Show values under the pointer. The figures of a section share one time axis; the page holds their values as JSON.
const tip = document.getElementById("tip");
for (const section of document.querySelectorAll("section.charts")) {
  const { left, right, time, figures } = JSON.parse(section.querySelector("script").textContent);
  const pictures = [...section.querySelectorAll("svg.plot")];
  const crosses = pictures.map((picture) => picture.querySelector(".cross"));
  const show = (on) => {
    tip.hidden = !on;
    for (const cross of crosses) cross.style.visibility = on ? "visible" : "hidden";
  };
  pictures.forEach((picture, f) => {
    picture.addEventListener("pointerleave", () => show(false));
    const move = (event) => {
      const box = picture.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      const x = 1000 * share;
      const bin = right.findIndex((edge) => x <= edge);
      if (bin < 0 || x < left[bin]) return show(false);
      const lines = ([name, unit, values, kinds]) =>
        values[bin] === null ? [] : [`${name}  ${kinds ? kinds[values[bin]] : values[bin].toLocaleString("en")}${unit}`];
      tip.textContent = [time[bin], ...figures[f].flatMap(lines)].join("\n");
      for (const cross of crosses) {
        cross.setAttribute("x1", `${100 * share}%`);
        cross.setAttribute("x2", `${100 * share}%`);
      }
      show(true);
      const beside = event.clientX + 14 + tip.offsetWidth < innerWidth;
      tip.style.left = `${Math.max(4, beside ? event.clientX + 14 : event.clientX - 14 - tip.offsetWidth)}px`;
      tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)}px`;
    };
    picture.addEventListener("pointermove", move);
    picture.addEventListener("pointerdown", move);
  });
}
