// Browsers refuse workers to pages that are opened as files. There the search runs in a hidden frame of the page.
if (location.protocol === "file:") {
  window.Worker = class {
    onmessage = null
    onerror = null

    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.documentElement.append(this.frame)
      this.inner = this.frame.contentWindow
      // What the script posts comes to the page, and not back to the frame.
      this.inner.postMessage = data => setTimeout(() => this.onmessage?.({ data: structuredClone(data) }))
      this.ready = new Promise((resolve, reject) => {
        const script = this.inner.document.createElement("script")
        script.src = new URL(url, document.baseURI).href
        script.onload = resolve
        script.onerror = reject
        this.inner.document.documentElement.append(script)
      })
      this.ready.catch(() => this.onerror?.(new Event("error", { cancelable: true })))
    }

    postMessage(data) {
      const copy = structuredClone(data)
      this.ready.then(() => this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data: copy })))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
