{
  "tool": "https://github.com/kopia/kopia",
  "buildVersion": "v0-unofficial",
  "buildInfo": "-(unknown_revision)",
  "uniqueID": "XEXElS5C1Cp+CW83/LpYDXo5BuewokCIO2YycJ4ddBs=",
  "keyAlgo": "scrypt-65536-8-1",
  "encryption": "AES256_GCM",
  "encryptedBlockFormat": "/wGq1hIu8phHNUNe2i49Ur36ZtWFmY23niAjIooeWGco/s/COY2l/+GQUgQ+KxR70SwEEi4ULNlLNu7+eI7JXUGTS3pBHkGV2Bk/WsYtsSrnaN+H+DhI6crXzVyexOqum54TuohHj9o9ldB97ZLmnludTn59Uy2IxCAhkw+kz/aVliLwnejEsieWWDoXm3JdiUpTwb6LEjIZ3TQZKLO1DeFX+K3KOz89bsFwRO3FA4GPwMyZOEcEjM//eW8xyDbZolS3HCxMnJVHfdAbNpxp7ZEmWJ9X/U79k8cpl5nVbkvlhHcgJz1oXbxR5FHs5HVW7CJCw2So710cWqiHgwwZdNU321TPekE1ETAgiw02ifBW0hvXorQI9ybL48IHxpR+d26cx0DrQlpmXo7w3h2fugeBm559Kx6Jeq0Q9jUTqO/0rFFWClJSk1ceh148gr/7fA9RMy7EKSV0VbMcYO/z6Dtu1r8b7kCnKwj7uw/Hzi1utupmsZtNhziIrZs3yYPDdLfkzau7FkkPpzLZPBtFA2ikLx8Q56bPBG3wy8lFsysZ30ozYhpmMqE85K6F6id/bZ34YSGYGRfsfvj+Ljpoc5cquunbK3Y/jFG05w4PPR2KLpdnFruzeZxdYlejru7d8CrosniNeMMvV/7xRKucYdin2fEhosAzytcAyfAiVHgt3FQRg1LYDKpIRb/WPg/JvKkEP7uFFA99VUx2El9i0/CY0a7ShRWExQrWDvglfOuGPDNojnZMbY5z+hq90SpMDogckQOugdZYqm0="
}
