"""Chat templates (Jinja) for processors that come without one."""

#: ChatML, as the Qwen models speak it; [image] and [video] are replaced by the family's markers.
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}[image]{% elif part['type'] == 'video' %}[video]"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: LLaVA-1.5: images first in each turn, then `USER: … ASSISTANT: …`.
USER_ASSISTANT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

#: PaliGemma: all images first, then the words of all turns, one per line; the processor adds the rest.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% endfor %}"
    "{% for message in messages %}{% if not loop.first %}\n{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if not loop.first %} {% endif %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}"
)
