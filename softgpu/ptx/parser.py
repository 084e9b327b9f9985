# SPDX-License-Identifier: Apache-2.0
"""PTX text -> functions, variables, instructions, each with its line.

Statements end with `;`, but `.loc`, `.file` and the module's head directives end with their line,
and `{ }` opens a scope with its own registers and labels (inline assembly does). Unknown
text raises PtxError with its line; nothing is skipped silently.
"""

from __future__ import annotations

import bisect
import re

from .errors import PtxError
from .immediates import NUMBER, initial_bytes
from .syntax import (
    SIZES,
    Address,
    Function,
    Immediate,
    Instruction,
    Not,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)

_COMMENT = re.compile(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', re.S)
_LABEL = re.compile(r"[A-Za-z_$%][\w$]*\s*:(?!:)")
_NAME = re.compile(r"[A-Za-z_$%][\w$]*")
_LINE_DIRECTIVES = (".loc", ".file", ".version", ".target", ".address_size")
_LINKING = (".visible", ".extern", ".weak", ".common", ".entry", ".func")
_SPACES = (".global", ".const", ".shared", ".local", ".param")
_TUNING = (
    *(".maxntid", ".reqntid", ".minnctapersm", ".maxnreg", ".maxnctapersm", ".noreturn"),
    *(".explicitcluster", ".reqnctapercluster", ".maxclusterrank", ".blocksareclusters", ".pragma"),
)
_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|globaltimer|"
    r"clusterid|nclusterid|cluster_ctaid|cluster_nctaid|cluster_ctarank|cluster_nctarank|"
    r"is_explicit_cluster|dynamic_smem_size|total_smem_size|aggr_smem_size|globaltimer_lo|"
    r"globaltimer_hi|lanemask_(eq|le|lt|ge|gt))(\.[xyzw])?$"
)


class Parser:
    """One pass over a text; `functions` and `variables` are its result."""

    def __init__(self, text: str):
        self.text = _COMMENT.sub(_blank, text)
        self._newlines = [i for i, c in enumerate(self.text) if c == "\n"]
        self.position = 0
        self.functions: dict[str, Function] = {}
        self.variables: dict[str, Variable] = {}
        self.target = ""
        self._function: Function | None = None
        self._scopes: list[dict] = []
        self._scope_names: list[str] = []
        self._scope_count = 0
        while self._skip_space():
            self._statement()

    # --- text ---------------------------------------------------------------------------------

    def line(self, position=None) -> int:
        return (
            bisect.bisect_left(self._newlines, self.position if position is None else position) + 1
        )

    def _skip_space(self) -> bool:
        text, n = self.text, len(self.text)
        while self.position < n and text[self.position] in " \t\r\n;":
            self.position += 1
        return self.position < n

    def _until(self, stops: str) -> str:
        start, depth = self.position, 0
        while self.position < len(self.text):
            c = self.text[self.position]
            if depth == 0 and c in stops:
                break
            depth += (c in "([") - (c in ")]")
            self.position += 1
        return self.text[start : self.position]

    # --- statements ---------------------------------------------------------------------------

    def _statement(self) -> None:
        start, c = self.position, self.text[self.position]
        if c == "{":
            self.position += 1
            self._scope_count += 1
            self._open_scope(f"{self._scope_count}")
        elif c == "}":
            self.position += 1
            self._close_scope(start)
        elif c == ".":
            self._directive(re.compile(r"\.\w+").match(self.text, start).group(), start)
        elif match := _LABEL.match(self.text, start):
            self.position = match.end()
            name = match.group().rstrip(": \t")
            # Labels may be used before they are seen: they keep their scope's path in the name.
            self._scopes[-1]["labels"].add(name)
            self._function.labels["/".join(self._scope_names) + "/" + name] = len(
                self._function.body
            )
        else:
            self._instruction(self._until(";").strip(), start)

    def _directive(self, word: str, start: int) -> None:
        if word in _LINE_DIRECTIVES:
            text = self._until("\n")
            if word == ".target":
                self.target = text.split()[1].rstrip(",")
        elif word == ".section":
            self._until("{")
            self.position = self.text.index("}", self.position) + 1
        elif word == ".reg":
            self._registers(self._until(";"), start)
        elif word in (".pragma", ".branchtargets", ".alias"):
            self._until(";")
        elif word in _LINKING or word in _SPACES:
            self._declaration(start)
        else:
            raise PtxError(f"unknown directive {word}", self.line(start))

    def _registers(self, text: str, start: int) -> None:
        _, kind, names_text = re.split(r"\s*\.\s*|(?<=\w)\s+", text.strip()[1:], maxsplit=2)
        if kind not in SIZES:
            raise PtxError(f"unknown register type .{kind}", self.line(start))
        for name in names_text.split(","):
            name = name.strip()
            many = re.match(r"(.+)<(\d+)>$", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            file = "pred" if kind == "pred" else SIZES[kind]
            rows = self._function.registers
            for one in names:
                self._scopes[-1]["registers"][one] = Register(one, kind, rows.get(file, 0))
                rows[file] = rows.get(file, 0) + 1

    def _declaration(self, start: int) -> None:
        text = self._until("{;=")
        if ".entry" in text.split("(")[0] or ".func" in text.split("(")[0]:
            self._function_head(text, start)
            return
        initial = None
        if self.text[self.position] == "=":
            self.position += 1
            initial = self._until(";").strip()
        variable = self._variable(text, self.line(start), initial)
        if self._function:
            self._function.variables[variable.name] = variable
        else:
            self.variables[variable.name] = variable

    def _variable(self, text: str, line: int, initial: str | None = None) -> Variable:
        words = re.findall(r"\.\w+|[\w$%]+(?:\s*\[[^\]]*\])*|\d+", text)
        space, kind, align, name, extern, lanes, pointee = "", "", 0, "", False, 1, False
        for i, word in enumerate(words):
            if word in _SPACES and not space:
                space = word[1:]
            elif word == ".extern":
                extern = True
            elif word == ".align":
                if not pointee:  # `.u64 .ptr .global .align 1` describes what the pointer points to
                    align = int(words[i + 1])
            elif word == ".ptr":
                pointee = True
            elif word in (".v2", ".v4"):
                lanes = int(word[2])
            elif word.startswith(".") and word[1:] in SIZES:
                kind = word[1:]
            elif word in (".visible", ".weak", ".common", *_SPACES, ".managed"):
                pass
            elif word.startswith("."):
                raise PtxError(f"unknown directive {word} in a declaration", line)
            elif not word.isdigit():
                name = word
        dims = [int(d, 0) if d.strip() else 0 for d in re.findall(r"\[([^\]]*)\]", name)]
        size = SIZES[kind] * lanes
        for d in dims:
            size *= d
        name = name.split("[")[0].strip()
        data = initial_bytes(initial, kind, size, line) if initial else None
        return Variable(name, space, align or SIZES[kind] * lanes, size, kind, data, extern)

    def _function_head(self, text: str, start: int) -> None:
        head = re.match(
            r"\s*(?P<link>(?:\.\w+\s+)*?)\.(?P<kind>entry|func)\s*(?P<ret>\([^)]*\))?\s*"
            r"(?P<name>[\w$]+)\s*(?P<params>\((?:[^()]|\([^)]*\))*\))?(?P<rest>.*)$",
            text,
            re.S,
        )
        if head is None:
            raise PtxError(f"unreadable function head {text.split(chr(10))[0]!r}", self.line(start))
        function = Function(head["name"], head["kind"] == "entry", self.line(start))
        function.params = self._params(head["params"], start)
        function.results = self._params(head["ret"], start)
        for match in re.finditer(r"(\.\w+)([^.]*)", head["rest"]):
            if match[1] not in _TUNING:
                raise PtxError(f"unknown directive {match[1]}", self.line(start))
            function.directives[match[1]] = match[2].strip()
        function.defined = self.text[self.position] == "{"
        if function.defined or function.name not in self.functions:
            self.functions[function.name] = function
        if function.defined:
            self.position += 1
            self._function = function
            self._open_scope(function.name)

    def _params(self, text: str | None, start: int) -> list[Variable]:
        inner = text.strip()[1:-1].strip() if text else ""
        return [self._variable(p, self.line(start)) for p in inner.split(",")] if inner else []

    def _open_scope(self, name: str) -> None:
        self._scopes.append({"registers": {}, "labels": set()})
        self._scope_names.append(name)

    def _close_scope(self, start: int) -> None:
        if not self._scopes:
            raise PtxError("unbalanced }", self.line(start))
        self._scopes.pop()
        self._scope_names.pop()
        if not self._scopes:
            body, labels = self._function.body, self._function.labels
            ended = body and body[-1].opcode in ("ret", "exit") and body[-1].guard is None
            if not ended or len(body) in labels.values():
                body.append(Instruction("ret", (), self.line(start)))
            self._function = None
            self._scope_count = 0

    # --- instructions -------------------------------------------------------------------------

    def _instruction(self, text: str, start: int) -> None:
        line = self.line(start)
        if self._function is None:
            raise PtxError(f"statement outside a function: {text[:60]!r}", line)
        guard = None
        if text.startswith("@"):
            word, text = text[1:].split(None, 1)
            guard = self._operand(word, line)
        opcode, _, rest = text.strip().replace("\n", " ").replace("\t", " ").partition(" ")
        operands = tuple(self._operand(o, line) for o in _split(rest))
        if opcode.split(".")[0] == "bra":
            operands = (Symbol("/".join(self._scope_names) + "/" + operands[-1].name),)
        self._function.body.append(Instruction(opcode, operands, line, guard))

    def _operand(self, text: str, line: int):
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("["):
            return self._address(text[1:-1], line)
        if text.startswith("{"):
            return Vector(tuple(self._operand(o, line) for o in _split(text[1:-1])))
        if text.startswith("("):
            return Vector(tuple(self._operand(o, line) for o in _split(text[1:-1])))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first, line), self._operand(second, line))
        if text.startswith("!"):
            return Not(self._operand(text[1:], line))
        if NUMBER.match(text):
            return Immediate(text)
        if _SPECIAL.match(text):
            return Special(text)
        for scope in reversed(self._scopes):
            if text in scope["registers"]:
                return scope["registers"][text]
        if re.fullmatch(r"[A-Za-z_$][\w$]*", text):
            return Symbol(text)
        if match := re.fullmatch(r"([A-Za-z_$][\w$]*)\s*\+\s*(\d+)", text):
            return Address(Symbol(match[1]), int(match[2]))
        raise PtxError(f"unknown operand {text!r}", line)

    def _address(self, text: str, line: int) -> Address:
        parts = _split(text)
        match = re.fullmatch(r"\s*([^\s+]+?)\s*(?:\+\s*(-?\w+))?\s*", parts[0])
        if match is None:
            raise PtxError(f"unreadable address [{text}]", line)
        coordinates = tuple(self._operand(p, line) for p in parts[1:])
        if len(coordinates) == 1 and isinstance(coordinates[0], Vector):
            coordinates = coordinates[0].items
        return Address(self._operand(match[1], line), int(match[2] or "0", 0), coordinates)


def resolve_labels(function: Function) -> dict[str, int]:
    """Branch operand -> index: the innermost scope around the branch that has the label."""
    resolved = {}
    for instruction in function.body:
        if instruction.name != "bra":
            continue
        path = instruction.operands[0].name
        *scopes, name = path.split("/")
        while scopes and "/".join([*scopes, name]) not in function.labels:
            scopes.pop()
        if not scopes:
            raise PtxError(f"unknown label {name}", instruction.line)
        resolved[path] = function.labels["/".join([*scopes, name])]
    return resolved


def _blank(match: re.Match) -> str:
    text = match.group()
    return text if text.startswith('"') else re.sub(r"[^\n]", " ", text)


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += c
    return [p for p in (*parts, current) if p.strip()]
