"""The report page's style sheet: the system's own fonts, light and dark by the reader's preference."""

STYLE = """
:root { --text: #1c2430; --soft: #5b6675; --line: #d5dae1; --back: #ffffff; --panel: #f4f6f9; --good: #0a7a55;
  --bad: #b3261e; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --soft: #9aa6b5; --line: #303a47; --back: #161b22;
  --panel: #1e2530; --good: #3fd6a6; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 0.5rem; }
h2 { font-size: 1.4rem; margin: 2.5rem 0 0.75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 0.5rem; }
p { max-width: 48rem; margin: 0.5rem 0 1rem; }
.lead { color: var(--soft); }
.passed { color: var(--good); font-weight: 600; }
.failed { color: var(--bad); font-weight: 700; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; margin: 0.5rem 0 1rem; }
th, td { padding: 0.35rem 0.8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.word { text-align: left; }
.number { text-align: right; }
.note { color: var(--soft); font-size: 0.85rem; }
img { display: block; width: 100%; height: auto; margin: 1rem 0; }
pre { background: var(--panel); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: 0.85rem; }
.cards { list-style: none; display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1.25rem 0; padding: 0; }
.cards li { flex: 1 1 11rem; background: var(--panel); border-radius: 6px; padding: 0.8rem 1rem; color: var(--soft);
  font-size: 0.85rem; }
.cards strong { display: block; color: var(--text); font-size: 1.6rem; line-height: 1.3; }
"""
