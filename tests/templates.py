"""Chat templates of the kinds that are in use, by behaviour."""

INSERTS = (  # SmolLM, Qwen 2.5: a system turn appears by itself
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are Tinny, made by Tin Works.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (  # ChatML, nothing inserted
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER = (  # Llama 3.1: a sequence start, and a system turn with a date that is always there
    "<|begin|><|head|>system<|end|>\n\nToday: 1 May\n\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}<|eot|>"
    "{% for m in messages %}<|head|>{{ m['role'] }}<|end|>\n\n{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|end|>\n\n{% endif %}"
)
RAISES = (  # Gemma 2: refuses the role
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|begin|>{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
FOLDS = (  # Mistral, Gemma 3: puts the system text into the user's turn
    "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% endif %}<|begin|>{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ sys if loop.first else '' }}{{ m['content'] }} [/INST]{% else %}{{ m['content'] }}<|eot|>{% endif %}{% endfor %}"
)
THINKS = (  # Qwen 3 without thinking: an empty block before the last answer
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EMPTY_IS_DEFAULT = INSERTS.replace(  # an empty system message is treated as none
    "loop.first and m['role'] != 'system'", "loop.first and (m['role'] != 'system' or not m['content'])"
)
STRIPS = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
