"""How Gradio's own controls look: quiet, in the colours of a report, with fonts that are there."""

from __future__ import annotations

import gradio as gr
from gradio import themes


def theme() -> gr.Theme:
    """Return the theme: what differs between light and dark, then what is the same in both."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    both: dict[str, tuple[str, str]] = {
        "body_background_fill": ("#ffffff", "#15191e"),
        "body_text_color": ("#1c2127", "#e8ebee"),
        "body_text_color_subdued": ("#5b6570", "#9aa5b1"),
        "block_background_fill": ("#ffffff", "#15191e"),
        "block_label_text_color": ("#5b6570", "#9aa5b1"),
        "block_title_text_color": ("#1c2127", "#e8ebee"),
        "block_info_text_color": ("#5b6570", "#9aa5b1"),
        "border_color_primary": ("#e4e7eb", "#2b323a"),
        "border_color_accent": ("#0072b2", "#56b4e9"),
        "background_fill_primary": ("#ffffff", "#15191e"),
        "background_fill_secondary": ("#f5f6f8", "#1b2026"),
        "input_background_fill": ("#f5f6f8", "#1b2026"),
        "input_border_color": ("#e4e7eb", "#2b323a"),
        "input_border_color_focus": ("#0072b2", "#56b4e9"),
        "input_placeholder_color": ("#5b6570", "#9aa5b1"),
        "slider_color": ("#0072b2", "#56b4e9"),
        "button_primary_background_fill": ("#0072b2", "#56b4e9"),
        "button_primary_background_fill_hover": ("#005d92", "#7cc6f0"),
        "button_primary_text_color": ("#ffffff", "#10161c"),
        "button_primary_text_color_hover": ("#ffffff", "#10161c"),
        "button_secondary_background_fill": ("#f5f6f8", "#1b2026"),
        "button_secondary_background_fill_hover": ("#e4e7eb", "#2b323a"),
        "button_secondary_text_color": ("#1c2127", "#e8ebee"),
        "link_text_color": ("#0072b2", "#56b4e9"),
        "checkbox_background_color_selected": ("#0072b2", "#2f78c8"),
        "checkbox_border_color_selected": ("#0072b2", "#2f78c8"),
        "checkbox_label_background_fill": ("#f5f6f8", "#1b2026"),
        "checkbox_label_background_fill_selected": ("#f5f6f8", "#1b2026"),
        "checkbox_label_text_color": ("#1c2127", "#e8ebee"),
        "checkbox_label_text_color_selected": ("#1c2127", "#e8ebee"),
    }
    colors = {name: light for name, (light, _) in both.items()}
    colors |= {f"{name}_dark": dark for name, (_, dark) in both.items()}
    plain = {
        "block_border_width": "0px", "block_shadow": "none", "block_padding": "0px",
        "block_label_background_fill": "transparent", "input_shadow": "none",
        "input_shadow_focus": "none", "button_primary_shadow": "none", "layout_gap": "1.1rem",
        "button_secondary_shadow": "none", "checkbox_label_shadow": "none",
        "block_title_text_weight": "600", "block_title_text_size": ".9rem",
    }  # fmt: skip
    base = themes.Base(text_size="lg", radius_size="md", font=sans, font_mono=mono)
    return base.set(**colors, **plain)
