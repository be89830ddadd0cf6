// Nothing to see: this widget brings the style sheet of the boards.

export default { render() {} };
