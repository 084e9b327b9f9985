# SPDX-License-Identifier: Apache-2.0
"""How the pages look: light or dark as the reader has set, on a wide screen or a phone.

What is wider than the screen scrolls in a box of its own, so that nothing shrinks until it cannot
be read and the page itself never moves sideways.
"""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1d2733; --quiet: #52606d; --line: #e2e6ea;
        --rule: #1d2733; --head: #f5f7fa; --warn: #8d5a00; --target: #fff0b8 }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --text: #dfe5eb; --quiet: #9fb0c0; --line: #2b333c; --rule: #9fb0c0;
          --head: #1e242b; --warn: #f0b860; --target: #51440f }
  img { filter: invert(.91) hue-rotate(180deg) } /* of a plot on white: hues stay */
}
body { font: 15px/1.5 system-ui, sans-serif; background: var(--page); color: var(--text);
       max-width: 1240px; margin: 0 auto; padding: 1.5rem clamp(12px, 3vw, 24px) }
h1 { font-size: 1.6em; margin-bottom: .2em; overflow-wrap: anywhere }
h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 2px solid var(--line) }
.quiet { color: var(--quiet); font-size: .88em; overflow-wrap: anywhere }
.warning { color: var(--warn) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .86em; font-variant-numeric: tabular-nums }
th, td { padding: .25em .6em; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--line) }
tr:target td { background: var(--target) }
"""
