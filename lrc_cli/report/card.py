def render_card(report): return "x"
