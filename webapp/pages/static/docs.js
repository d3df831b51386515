// Shows the OpenAPI document with Swagger UI, which its own file has put in `SwaggerUIBundle`.

const place = document.getElementById("operations");

SwaggerUIBundle({
  domNode: place,
  url: place.dataset.document,
  deepLinking: true,
  displayRequestDuration: true,
  // The token would otherwise stay in the browser's storage.
  persistAuthorization: false,
});
