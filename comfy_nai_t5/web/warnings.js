// Shows what a node has to tell beside its result, such as a LoRA that changes nothing.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

api.addEventListener("nai-t5.warning", ({ detail }) => {
  app.extensionManager.toast.add({ severity: "warn", summary: "T5", detail: detail.text, life: 20000 });
});
