"""How the demo page looks: a theme with system fonts, and CSS for results. Nothing is loaded from other servers."""

import gradio

SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gradio.themes.Base:
    """The theme of the page."""
    return gradio.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        font=list(SANS),
        font_mono=list(MONO),
    ).set(
        body_background_fill="*neutral_50",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white",
        block_label_text_weight="600",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        block_info_text_color="*neutral_600",
        input_placeholder_color="*neutral_500",
        color_accent="*primary_700",
    )


# All clips of a comparison follow its first one: they begin to play whenever each of them is loaded. The button of the
# drawer gets the name that it shows.
SCRIPT = """
<script>
window.omniVideoInStep = function (clip) {
  const clips = clip.closest(".ov-compare").querySelectorAll("video");
  if (clip !== clips[0]) return;
  for (const other of clips) {
    if (other !== clip && Math.abs(other.currentTime - clip.currentTime) > 0.08) other.currentTime = clip.currentTime;
  }
};
(function nameTheDrawer() {
  const button = document.querySelector("#settings .toggle-button");
  if (button) button.setAttribute("aria-label", "Settings");
  else setTimeout(nameTheDrawer, 200);
})();
</script>
"""

CSS = """
.gradio-container { --body-text-color-subdued: #475569; }
.dark .gradio-container, .gradio-container.dark { --body-text-color-subdued: #cbd5e1; }
#settings .toggle-button {
  width: auto; height: auto; padding: 0.45rem 0.9rem; transform: none !important; border-radius: 999px 0 0 999px;
  background: var(--background-fill-primary); font-weight: 600; font-size: 0.9rem;
}
#settings .sidebar-content { padding-top: 3.5rem; }
#settings .toggle-button::before { content: "Settings"; }
#settings .toggle-button > * { display: none; }
.gradio-container table td, .gradio-container table th { text-align: left; }
.ov-head h1 { font-size: 1.6rem; margin: 0; letter-spacing: -0.02em; }
.ov-head p { margin: 0.25rem 0 0; color: var(--body-text-color-subdued); max-width: 46rem; }
.ov-head code { font-size: 0.9em; }
.html-container:has(.ov-stage, .ov-head) { padding: 0 !important; }
.ov-stage {
  box-sizing: border-box; min-height: 21rem; padding: 1rem; display: flex; flex-direction: column; gap: 0.6rem;
  align-items: center; justify-content: center; border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-lg); background: var(--background-fill-primary);
}
.ov-stage p { margin: 0; text-align: center; overflow-wrap: anywhere; }
.ov-empty { color: var(--body-text-color-subdued); border-style: dashed; }
.ov-error { color: var(--error-text-color, #b91c1c); border-color: currentColor; }
.ov-source { min-height: 0; padding: 0.5rem; }
.ov-source .ov-media { width: min(100%, 14rem); }
.ov-media {
  display: block; width: min(100%, 22rem); height: auto; max-height: 60vh; object-fit: contain; border-radius: 8px;
  background: #0b1120; margin: 0;
}
.ov-pixels .ov-media { image-rendering: pixelated; }
.ov-stage progress {
  width: min(100%, 22rem); height: 0.5rem; appearance: none; border: 0; border-radius: 999px; overflow: hidden;
  background: var(--neutral-200, #e2e8f0);
}
.ov-stage progress::-webkit-progress-bar { background: var(--neutral-200, #e2e8f0); }
.ov-stage progress::-webkit-progress-value { background: var(--primary-700, #0f766e); }
.ov-stage progress::-moz-progress-bar { background: var(--primary-700, #0f766e); }
.ov-noise {
  width: min(100%, 16rem); aspect-ratio: 1; border-radius: 8px;
  background: repeating-conic-gradient(var(--neutral-200) 0 25%, var(--neutral-300) 0 50%) 50% / 16px 16px;
  opacity: 0.6;
}
.ov-caption, .ov-note { font-size: 0.85rem; color: var(--body-text-color-subdued); }
.ov-note { font-style: italic; }
.ov-question { color: var(--body-text-color-subdued); }
.ov-words { font-size: 1.35rem; }
.ov-compare { display: flex; flex-flow: row wrap; gap: 0.4rem; justify-content: center; }
.ov-compare > input { position: absolute; opacity: 0; pointer-events: none; }
.ov-compare > label {
  padding: 0.25rem 0.8rem; border: 1px solid var(--border-color-primary); border-radius: 999px; cursor: pointer;
  font-size: 0.9rem;
}
.ov-compare > input:checked + label {
  background: var(--primary-700, #0f766e); color: white; border-color: transparent;
}
.ov-compare > input:focus-visible + label { outline: 3px solid var(--primary-300, #5eead4); outline-offset: 2px; }
.ov-pane {
  flex: 1 0 100%; display: none; flex-wrap: wrap; gap: 0.8rem; justify-content: center; align-items: center;
  margin-top: 0.4rem;
}
.ov-pane > .ov-caption { flex-basis: 100%; }
.ov-view-beside:checked ~ .ov-beside, .ov-view-slider:checked ~ .ov-slider,
.ov-view-difference:checked ~ .ov-difference { display: flex; }
.ov-compare > .ov-caption, .ov-compare > .ov-note { flex: 1 0 100%; }
.ov-compare figure { margin: 0; width: min(100%, 16rem); text-align: center; }
.ov-compare figcaption { font-size: 0.85rem; color: var(--body-text-color-subdued); margin-top: 0.25rem; }
.ov-compare .ov-media { width: 100%; }
.ov-wipe { position: relative; width: min(100%, 22rem); }
.ov-cut { position: absolute; inset: 0 0 auto 0; clip-path: inset(0 calc(100% - var(--cut)) 0 0); }
.ov-wipe::after {
  content: ""; position: absolute; top: 0; bottom: 2rem; left: var(--cut); width: 2px; background: white;
  box-shadow: 0 0 0 1px rgb(0 0 0 / 0.5); pointer-events: none;
}
.ov-wipe input[type="range"] { display: block; width: 100%; height: 2rem; margin: 0; accent-color: #0f766e; }
#chat-messages video, #chat-messages .message img { width: 12rem !important; max-width: 100%; height: auto; }
/* It would send a result to another server. */
button[aria-label="Share"] { display: none !important; }
"""

__all__ = ["CSS", "SCRIPT", "theme"]
