// The end of a conversation: who reads there stays there while more is written, who has scrolled away does not move.

const NEAR = 80; // pixels

export class End {
  /** scroller: what scrolls. button: shown to who is not at the end. */
  constructor(scroller, button) {
    this.scroller = scroller;
    this.button = button;
    this.followed = true; // by the reader's own last scrolling
    scroller.addEventListener("scroll", () => {
      this.followed = this.#near();
      button.hidden = this.followed;
    });
  }

  /** Go to the end. */
  go() {
    this.followed = true;
    this.keep();
  }

  /** There is more: go there too, if the reader was at the end. */
  keep() {
    if (this.followed) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.button.hidden = this.#near();
  }

  #near() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }
}
