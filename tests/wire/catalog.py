"""`GET /models` in the Codex shape; the entries are trimmed from a capture (November 2026)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .events import Event

EFFORTS = ("low", "medium", "high", "xhigh", "max", "ultra")


def model_entry(
    slug: str, priority: int, lite: bool = True, visibility: str = "list", efforts: Sequence[str] = EFFORTS
) -> Event:
    """Return one model of the catalogue."""
    entry: Event = {
        "slug": slug, "display_name": slug.upper(), "description": f"The model {slug}.",
        "default_reasoning_level": "medium",
        "supported_reasoning_levels": [{"effort": effort, "description": effort} for effort in efforts],
        "shell_type": "unified_exec", "visibility": visibility, "supported_in_api": True,
        "priority": priority, "additional_speed_tiers": ["fast"],
        "service_tiers": [{"id": "priority", "name": "Fast", "description": "1.5x speed, increased usage"}],
        "availability_nux": None, "upgrade": None, "model_messages": None,
        "include_skills_usage_instructions": False, "include_plugin_usage_instructions": False,
        "include_apps_usage_instructions": False, "default_reasoning_summary": "none",
        "support_verbosity": True, "default_verbosity": "low", "apply_patch_tool_type": "freeform",
        "web_search_tool_type": "text_and_image", "truncation_policy": {"mode": "tokens", "limit": 10000},
        "supports_image_detail_original": True, "context_window": 272000, "max_context_window": 872000,
        "comp_hash": "3000", "effective_context_window_percent": 95, "experimental_supported_tools": [],
        "input_modalities": ["text", "image"], "supports_search_tool": True,
        "supports_experimental_context": False, "supports_reasoning_effort_updates": False,
        "node_repl_auto_review_required": False, "node_repl_disabled": False,
        "base_instructions": "You are a coding agent.",
    }
    if lite:
        entry.update({"use_responses_lite": True, "tool_mode": "code_mode_only", "multi_agent_version": "v2"})
    return entry


CATALOG: list[Event] = [
    model_entry("gpt-6.1-sol", 1),
    model_entry("gpt-6-sol", 3),
    model_entry("gpt-5.6-sol", 5),
    model_entry("gpt-5.5", 13, lite=False, efforts=EFFORTS[:4]),
    model_entry("codex-auto-review", 43, visibility="hide", efforts=EFFORTS[:5]),
]
CATALOG_JSON = json.dumps(CATALOG)  # each stand-in has a copy of its own
