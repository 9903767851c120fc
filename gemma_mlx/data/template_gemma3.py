"""Gemma 3's conversation format, for checkpoints that come without a template (the base models)."""

TURN_OPEN, TURN_CLOSE = "<start_of_turn>", "<end_of_turn>"

DEFAULT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(first='') -%}
{%- macro say(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for part in content -%}{{- part.text | trim -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0].role == 'system' -%}
    {%- set ns.first = say(messages[0].content) + '\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{{- raise_exception('only the first turn may be a system turn') -}}{%- endif -%}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
    {%- if loop.first -%}{{- ns.first -}}{%- endif -%}
    {{- say(message.content) -}}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""
"""A system turn has no place of its own in this format: it comes before what the user says first."""
