"""A checkpoint whose chat template knows tools and thoughts, in the token format of Gemma 4's."""

import json
from pathlib import Path

from small_checkpoint import make_folder
from tokenizers import Tokenizer

TOOL_SPECIAL = ("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<tool_response|>", '<|"|>')

# - A system turn holds the system text, then a declaration of each tool.
# - A model turn stays open over calls, their results and further assistant messages. Results follow their calls at
#   once, and what a message says beside its calls stands behind them. A call without a result ends in <|tool_response>.
# - Thoughts are kept behind the last user message alone.
TOOL_TEMPLATE = """\
{%- macro payload(value) -%}
    {%- if value is string -%}{{- '<|"|>' + value + '<|"|>' -}}
    {%- elif value is mapping -%}
        {{- '{' -}}
        {%- for key in value | sort -%}
            {{- key + ':' -}}{{- payload(value[key]) -}}{{- '' if loop.last else ',' -}}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif value is sequence -%}
        {{- '[' -}}
        {%- for inner in value -%}{{- payload(inner) -}}{{- '' if loop.last else ',' -}}{%- endfor -%}
        {{- ']' -}}
    {%- else -%}{{- value | tojson -}}{%- endif -%}
{%- endmacro -%}
{%- macro say(content) -%}
    {%- if content is string -%}{{- content | trim -}}
    {%- else -%}
        {%- for part in content -%}
            {{- part.text | trim if part.type == 'text' else '<|' + part.type + '|>' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user=-1, first=0, open=false) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- if tools or (messages and messages[0].role == 'system') -%}
    {{- '<|turn>system\\n' -}}
    {%- if messages and messages[0].role == 'system' -%}
        {{- say(messages[0].content) -}}{%- set ns.first = 1 -%}
    {%- endif -%}
    {%- for tool in tools or [] -%}
        {%- set f = tool['function'] -%}
        {{- '<|tool>declaration:' + f.name -}}
        {{- payload({'description': f.description or '', 'parameters': f.parameters or {}}) -}}{{- '<tool|>' -}}
    {%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if loop.index0 < ns.first or message.role == 'tool' -%}
    {%- elif message.role == 'user' -%}
        {{- '<|turn>user\\n' -}}{{- say(message.content) -}}{{- '<turn|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '' if ns.open else '<|turn>model\\n' -}}
        {%- set ns.open = true -%}
        {%- if message.reasoning_content and loop.index0 > ns.last_user -%}
            {{- '<|channel>thought\\n' + message.reasoning_content + '\\n<channel|>' -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- if call['function'].arguments is not mapping -%}{{- raise_exception('arguments') -}}{%- endif -%}
            {{- '<|tool_call>call:' + call['function'].name -}}
            {{- payload(call['function'].arguments) -}}{{- '<tool_call|>' -}}
        {%- endfor -%}
        {%- set rest = namespace(on=true, results=0, follows='') -%}
        {%- for later in messages[loop.index:] -%}
            {%- if rest.on and later.role == 'tool' -%}
                {%- set rest.results = rest.results + 1 -%}
                {{- '<|tool_response>response:' + (later.name or 'unknown') -}}
                {{- payload({'value': say(later.content)}) -}}{{- '<tool_response|>' -}}
            {%- elif rest.on -%}
                {%- set rest.on = false -%}{%- set rest.follows = later.role -%}
            {%- endif -%}
        {%- endfor -%}
        {{- say(message.content or '') -}}
        {%- if message.tool_calls and not rest.results -%}
            {{- '<|tool_response>' -}}
        {%- elif rest.follows == 'assistant' or (rest.results and not rest.follows and not message.content) -%}
        {%- else -%}
            {{- '<turn|>\\n' -}}{%- set ns.open = false -%}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('no such role: ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.open -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""
TOOLS_AND_EMPTY_THOUGHT = TOOL_TEMPLATE.replace(
    "    {{- '<|turn>model\\n' -}}\n{%- endif -%}\n",
    "    {{- '<|turn>model\\n<|channel>thought\\n<channel|>' -}}\n{%- endif -%}\n",
)
assert TOOLS_AND_EMPTY_THOUGHT != TOOL_TEMPLATE

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the sun does.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["town"],
        },
    },
}
DECLARATION = (
    '<|tool>declaration:weather{description:<|"|>What the sun does.<|"|>,parameters:{properties:{days:{type:'
    '<|"|>integer<|"|>},town:{type:<|"|>string<|"|>}},required:[<|"|>town<|"|>],type:<|"|>object<|"|>}}<tool|>'
)


def make_tool_folder(folder: Path, template: str = TOOL_TEMPLATE) -> Path:
    """`make_folder` with the tokens of tools, marked as special."""
    make_folder(folder, template)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(TOOL_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    assert tokenizer.get_vocab_size() <= rows
    return folder
