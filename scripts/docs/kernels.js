// SPDX-License-Identifier: Apache-2.0
// The rows of the table of kernels that have every word that was typed.
for (const kernels of document.querySelectorAll(".kernels")) {
  const input = kernels.querySelector("input")
  const rows = [...kernels.querySelectorAll("tbody tr")]

  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/)
    for (const row of rows) {
      row.hidden = !words.every((word) => row.dataset.words.includes(word))
    }
    kernels.querySelector("output").value = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`
  }

  kernels.querySelector("form").addEventListener("submit", (event) => event.preventDefault())
  input.addEventListener("input", filter)
  input.value = new URLSearchParams(location.search).get("kernels") ?? ""
  filter()
}
