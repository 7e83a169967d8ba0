"""What a fork server does before anything else: tie its life to its trainer's.

By itself it looks after its trainer only once it has imported torch, which takes a busy machine a minute.
"""

from datamodules.parent import die_with_parent

die_with_parent()
