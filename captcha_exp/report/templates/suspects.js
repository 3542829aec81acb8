"use strict";
const storageKey = "captcha-exp suspects " + document.body.dataset.key;
const rows = [...document.querySelectorAll("fieldset")];
const earlier = JSON.parse(document.getElementById("earlier").textContent);
const output = document.getElementById("corrections");

function decisionOf(row) {
  const checked = row.querySelector("input[type=radio]:checked");
  const action = checked ? checked.value : "";
  const label = action === "label" ? row.querySelector("input[type=text]").value.trim() : "";
  return action === "label" && !label ? null : action && { file: row.dataset.file, action, label };
}

function quote(text) {
  return /[",;\t\r\n]|^\s|\s$/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
}

function update() {
  const decisions = rows.map(decisionOf).filter(Boolean);
  const decided = new Set(decisions.map((each) => each.file));
  const all = [...earlier.filter((each) => !decided.has(each.file)), ...decisions];
  const lines = all.map((each) => [each.file, each.action, each.label].map(quote).join(","));
  output.value = ["file,action,label", ...lines].join("\n") + "\n";
  document.getElementById("count").textContent = decisions.length + " of " + rows.length + " decided";
  try {
    localStorage.setItem(storageKey, JSON.stringify(decisions));
  } catch {
    // the browser keeps nothing for local files; the text can still be saved
  }
}

function restore() {
  let decisions = [];
  try {
    decisions = JSON.parse(localStorage.getItem(storageKey) || "[]");
  } catch {
    return;
  }
  for (const each of decisions) {
    const row = rows.find((candidate) => candidate.dataset.file === each.file);
    if (row) {
      row.querySelector(`input[value=${each.action}]`).checked = true;
      if (each.action === "label") row.querySelector("input[type=text]").value = each.label;
    }
  }
}

document.addEventListener("input", (event) => {
  if (event.target.type === "text") {
    event.target.closest("fieldset").querySelector("input[value=label]").checked = true;
  }
  update();
});
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([output.value], { type: "text/csv" }));
  link.download = document.body.dataset.name;
  link.click();
  URL.revokeObjectURL(link.href);
});
restore();
update();
