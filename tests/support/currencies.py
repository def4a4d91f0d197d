"""The currencies that people pay in, and about how much of each a dollar is."""

RATES = {
    "BRL": "5.41",
    "EGP": "47.6",
    "EUR": "0.863",
    "GBP": "0.761",
    "GHS": "11.05",
    "INR": "89.2",
    "JPY": "156.4",
    "KES": "129.7",
    "NGN": "1447.5",
    "RWF": "1452",
    "TZS": "2445",
    "UGX": "3560",
    "XAF": "566.2",
    "XOF": "566.2",
    "ZAR": "17.3",
}
