"""The style sheet and the one small script of the report page.

Both stand inside the page: it opens from a file, asks the network for nothing, and follows the
reader's light or dark screen. Without the script everything can be read, only not sorted.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1d2229; --quiet: #66707c; --line: #dfe3e8;
  --blue: #2563a8; --orange: #b4501a; --good: #1a7a45; --bad: #b3261e; --tint: #eef4fb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1c2026; --ink: #e4e7eb; --quiet: #98a2ae; --line: #323943;
    --blue: #7fb2ea; --orange: #f0a06c; --good: #6fcf97; --bad: #f2918b; --tint: #1f2b39;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.6;
  font-family: system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.3; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
h2 small, .quiet { color: var(--quiet); font-weight: normal; }
p { margin: .5rem 0; }
a { color: var(--blue); }
.panel {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .75rem 1rem; overflow-x: auto;
}
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--quiet); font-weight: normal; font-size: .9rem; }
tbody th { text-align: left; font-weight: 600; }
.facts th { width: 34%; font-weight: normal; color: var(--quiet); vertical-align: top; }
.facts td { text-align: left; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--quiet); padding: .3rem 0; }
.tuned { font-weight: 600; }
.up { color: var(--good); } .down { color: var(--bad); }
.curve { display: block; width: 100%; height: auto; overflow: visible; }
.curve .grid { stroke: var(--line); }
.curve text { font-size: 12px; fill: var(--quiet); text-anchor: end; }
.curve text.mid { text-anchor: middle; }
.curve text.best { fill: var(--orange); font-weight: 600; text-anchor: start; paint-order: stroke;
  stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.curve text.best.end { text-anchor: end; }
.curve polyline { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.curve polyline.train { stroke: var(--blue); } .curve polyline.raw { stroke-width: 1; opacity: .4; }
.curve polyline.validation { stroke: var(--orange); }
.curve circle.train { fill: var(--blue); } .curve circle.validation { fill: var(--orange); }
.curve circle.best { fill: none; stroke: var(--orange); stroke-width: 1.6; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem;
  color: var(--quiet); }
.legend i { display: inline-block; width: 1.4em; height: .2em; margin-right: .4em;
  vertical-align: middle; background: var(--blue); border-radius: .1em; }
.legend i.raw { opacity: .4; } .legend i.validation { background: var(--orange); }
.alarm { color: var(--bad); }
.tools { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; margin: .75rem 0; }
select { font: inherit; padding: .2rem .4rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .3rem; max-width: 100%; }
.row { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  margin: 0 0 .9rem; overflow: hidden; scroll-margin-top: .5rem; }
.row:target { border-color: var(--blue); }
.row header { display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: .35rem .9rem;
  font-size: .85rem; color: var(--quiet); border-bottom: 1px solid var(--line); }
.row header b { margin-right: auto; }
.texts { display: grid; grid-template-columns: 1fr 1fr; }
.texts > div { padding: .5rem .9rem .7rem; min-width: 0; }
.texts > div + div { border-left: 1px solid var(--line); }
.texts + .texts { border-top: 1px solid var(--line); }
.texts .tuned { font-weight: normal; background: var(--tint); }
.texts span { display: block; font-size: .8rem; color: var(--quiet); }
.texts bdi { display: block; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  th, td { padding: .35rem .3rem; }
  .texts { grid-template-columns: 1fr; }
  .texts > div + div { border-left: 0; border-top: 1px solid var(--line); }
  .row header { gap: .1rem .6rem; }
  .curve text { font-size: 19px; }
}
@media print { .tools { display: none; } .row { break-inside: avoid; } }
"""

SCRIPT = """
const choice = document.getElementById('order');
const list = document.getElementById('rows');
function reorder() {
  const [name, sign] = choice.value.split(' ');
  const value = row => Number(row.dataset[name]) * Number(sign);
  const rows = [...list.children].sort(
    (a, b) => value(a) - value(b) || a.dataset.index - b.dataset.index);
  list.append(...rows);
}
choice.parentElement.hidden = false;
choice.addEventListener('change', reorder);
reorder();
"""
